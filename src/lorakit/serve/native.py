"""The inner loops in C++ (`native.cpp`), compiled once for this machine; and why they are off, where they are.

The compiler is the one that torch.compile needs as well. Where there is none, or the model is not on a processor, or its
numbers are neither float32 nor bfloat16, the engine takes the same steps in PyTorch: slower, not otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("lorakit")

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
_WIDE = ("-mprefer-vector-width=512",)
"""A flag that only x86 compilers know."""


class Obstacle(Exception):  # noqa: N818 - a reason, told in the log, not an error of its own
    """Why the compiled loops cannot be had."""


def _folder() -> Path:
    root = os.environ.get("LORAKIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lorakit-native"


def _compile() -> Path:
    """The shared library for this source, compiler and processor; made where it is not there yet."""
    compiler = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise Obstacle("no C++ compiler was found (g++, clang++)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor += next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    key = hashlib.sha256("\n".join([SOURCE.read_text(), version, processor, *FLAGS]).encode()).hexdigest()[:20]
    target = _folder() / f"{key}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "native.so"
            wide = _WIDE if platform.machine() in ("x86_64", "AMD64") else ()
            command = [compiler, *FLAGS, *wide, str(SOURCE), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if run.returncode:
                raise Obstacle(
                    f"{compiler} failed: {run.stderr.strip().splitlines()[-1] if run.stderr else 'no message'}"
                )
            os.replace(made, target)  # in one step: two servers may start at once
    except (OSError, subprocess.SubprocessError) as problem:
        raise Obstacle(f"compiling failed: {problem}") from problem
    return target


_POINTER, _INTEGER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "attend": [
        *([_POINTER, _INTEGER, _INTEGER] * 3),
        *([_POINTER] * 4),
        *(_INTEGER, _POINTER, _POINTER, _INTEGER, _POINTER),
        *([_INTEGER] * 5),
        *(_REAL, _REAL, _INTEGER, _POINTER),
    ],
    "adapt": [_POINTER, _INTEGER, _POINTER, *[_INTEGER] * 3, *[_POINTER] * 4, _INTEGER],
    "norm": [*[_POINTER] * 3, *[_INTEGER] * 2, *[_REAL] * 2],
    "turn": [_POINTER, *[_INTEGER] * 2, *[_POINTER] * 3, *[_INTEGER] * 3],
    "greatest": [_POINTER, _POINTER, _INTEGER, _INTEGER],
    "gate": [*[_POINTER] * 3, _INTEGER],
}


@functools.cache
def _library() -> ctypes.PyDLL | Obstacle:
    try:
        # The interpreter's lock is kept: the calls are short, and giving it up costs up to a switch interval each time.
        return ctypes.PyDLL(str(_compile()))
    except (Obstacle, OSError) as problem:
        log.info("serve: the compiled loops are off, %s", problem)
        return problem if isinstance(problem, Obstacle) else Obstacle(str(problem))


@functools.cache
def find(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The compiled function of this name for numbers of this type, or None."""
    library = _library()
    if isinstance(library, Obstacle) or dtype not in (torch.float32, torch.bfloat16):
        return None
    function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes, function.restype = _SIGNATURES[name], None
    return function  # type: ignore[no-any-return]


def obstacle(model: torch.nn.Module) -> str | None:
    """Why this model is served without the compiled loops, or None."""
    first = next(model.parameters())
    if first.device.type != "cpu":
        return f"the model is on {first.device}"
    if first.dtype not in (torch.float32, torch.bfloat16):
        return f"its numbers are {first.dtype}"
    library = _library()
    return str(library) if isinstance(library, Obstacle) else None


def large_pages(tensor: Tensor) -> None:
    """Ask Linux to hold a large tensor in pages of 2 MB: what is read here and there then needs no long look-ups."""
    size, advice = 1 << 21, 14  # MADV_HUGEPAGE
    start = -(-tensor.data_ptr() // size) * size
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // size * size
    if length > 0 and tensor.device.type == "cpu" and platform.system() == "Linux":
        # It may say no, which is slower and no more.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def norm(x: Tensor, weight: Tensor, eps: float, shift: float) -> Tensor:
    """RMSNorm over the last axis of a contiguous x (..., width); `shift` is added to the weight (Gemma's 1)."""
    y = torch.empty_like(x)
    width = x.shape[-1]
    function = find("norm", x.dtype)
    assert function is not None
    function(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps, shift)
    return y


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: x (1, heads, tokens, d) turned by angles (tokens, d); the result lies tokens first in memory."""
    _, heads, tokens, d = x.shape
    y = x.new_empty(1, tokens, heads, d)
    function = find("turn", x.dtype)
    assert function is not None
    function(x.data_ptr(), x.stride(1), x.stride(2), cosine.data_ptr(), sine.data_ptr(), y.data_ptr(), heads, tokens, d)
    return y.transpose(1, 2)


def greatest(x: Tensor) -> Tensor:
    """The index of the first of the largest entries of each row of a contiguous x (rows, width)."""
    index = torch.empty(x.shape[0], dtype=torch.int64)
    function = find("greatest", x.dtype)
    assert function is not None
    function(x.data_ptr(), index.data_ptr(), *x.shape)
    return index


def gate(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b of two contiguous tensors of one shape."""
    y = torch.empty_like(a)
    function = find("gate", a.dtype)
    assert function is not None
    function(a.data_ptr(), b.data_ptr(), y.data_ptr(), a.numel())
    return y
