"""Every Triton kernel, in Triton's interpreter, gives what the functions in PyTorch give (`kernels.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own, since Triton decides between the interpreter and a GPU when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name("kernels.py"))]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
