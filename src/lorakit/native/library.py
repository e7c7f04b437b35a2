"""C++ sources of this package as libraries: compiled once for this machine, kept, and why that cannot be, where it cannot.

The compiler is the one that torch.compile needs as well. Whoever asks has the same steps in PyTorch for where there is none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADERS = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
_WIDE = ("-mprefer-vector-width=512",)
"""A flag that only x86 compilers know."""


class Obstacle(Exception):  # noqa: N818 - a reason, told in the log, not an error of its own
    """Why the compiled loops cannot be had."""


def cache_folder() -> Path:
    """Where what is found or made once for this machine is kept."""
    root = os.environ.get("LORAKIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lorakit-native"


@functools.cache
def processor() -> str:
    """The kind of processor and what it can do, in the system's words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (next((line for line in lines if line.startswith(word)), "") for word in ("model name", "flags"))
    return " ".join((platform.machine(), *named))


def compiled(source: Path) -> Path:
    """The shared library of a C++ file, for this compiler and processor; made where it is not there yet.

    Raises Obstacle with the reason where it cannot be made.
    """
    compiler = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise Obstacle("no C++ compiler was found (g++, clang++)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    headers = sorted(HEADERS.glob("*.h")) + sorted(source.parent.glob("*.h"))
    texts = [source.read_text(), *(header.read_text() for header in headers)]
    key = hashlib.sha256("\n".join([*texts, version, processor(), *FLAGS]).encode()).hexdigest()[:20]
    target = cache_folder() / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "made.so"
            wide = _WIDE if platform.machine() in ("x86_64", "AMD64") else ()
            command = [compiler, *FLAGS, *wide, f"-I{HEADERS}", str(source), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if run.returncode:
                raise Obstacle(
                    f"{compiler} failed: {run.stderr.strip().splitlines()[-1] if run.stderr else 'no message'}"
                )
            os.replace(made, target)  # in one step: two processes may start at once
    except (OSError, subprocess.SubprocessError) as problem:
        raise Obstacle(f"compiling failed: {problem}") from problem
    return target


POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""What the loops take: addresses, int64 and float32."""

TYPES = (torch.float32, torch.bfloat16)
"""The numbers that they are compiled for."""


class Library:
    """The functions of one C++ source, each for float32 and bfloat16 (`name_float32`, `name_bfloat16`).

    `signatures` gives the arguments of each; a function may be missing for a type. Nothing is compiled before the first
    question. `holding` keeps the interpreter's lock during calls: for short ones, since giving it up costs up to a switch
    interval each time.
    """

    def __init__(self, source: Path, signatures: Mapping[str, Sequence[Any]], *, holding: bool = False) -> None:
        self.source, self.signatures, self.holding = source, signatures, holding
        self.loaded = functools.cache(self._load)
        self.find = functools.cache(self._find)

    def _load(self) -> ctypes.CDLL | Obstacle:
        try:
            return (ctypes.PyDLL if self.holding else ctypes.CDLL)(str(compiled(self.source)))
        except (Obstacle, OSError) as problem:
            return problem if isinstance(problem, Obstacle) else Obstacle(str(problem))

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be had, or None."""
        library = self.loaded()
        return str(library) if isinstance(library, Obstacle) else None

    def _find(self, name: str, dtype: torch.dtype) -> Callable[..., None] | None:
        library = self.loaded()
        if isinstance(library, Obstacle) or dtype not in TYPES:
            return None
        function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}", None)
        if function is not None:
            function.argtypes, function.restype = self.signatures[name], None
        return function

    def call(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """The function of this name for numbers of this type; tensors go as their addresses."""
        function = self.find(name, dtype)
        assert function is not None  # whoever calls has asked
        function(*(one.data_ptr() if isinstance(one, Tensor) else one for one in arguments))

    def forget(self) -> None:
        """Ask anew next time."""
        self.loaded.cache_clear()
        self.find.cache_clear()
