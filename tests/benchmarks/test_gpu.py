"""The command for a GPU, with small shapes on a processor; its kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu


@pytest.mark.slow
def test_training_and_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--tiny", "--device", "cpu", "--output", str(tmp_path / "found.json")]) == 0
    found: dict[str, Any] = {row.pop("what"): row for row in json.loads((tmp_path / "found.json").read_text())}
    assert not any("failed" in row for row in found.values())
    for name in (
        "training tiny: lorakit",
        "training tiny: peft",
        "serving tiny: the base alone",
        "serving tiny: 4 adapters",
    ):
        assert found[name]["tokens_per_second"]
    assert "left_out" in found["kernels"]
    assert "share_of_the_base" in capsys.readouterr().out


@pytest.mark.slow
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own, as in tests/native/test_triton.py; a kernel that is wrong is told."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = """
import gpu
from lorakit.native import triton
from lorakit.native.triton import elementwise
triton.obstacle = lambda device, dtype: None
right = elementwise.gate
elementwise.gate = lambda kind, gate, up: right("silu", gate, up)
raise SystemExit(gpu.main(["--tiny", "--device", "cpu", "--only", "kernels"]))
"""
    paths = [str(Path(gpu.__file__).parent), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("kernel:")]
    assert len(lines) == 12, run.stdout + run.stderr[-3000:]
    wrong = [line for line in lines if "verdict right" not in line]
    assert [line.partition("  ")[0] for line in wrong] == ["kernel: gate gelu_tanh"], wrong
    assert run.returncode == 1
