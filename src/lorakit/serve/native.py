"""The inner loops in C++ (`native.cpp`, `linear.cpp`); and why they are off, where they are.

Where there is no compiler, or the model is not on a processor, or its
numbers are neither float32 nor bfloat16, the engine takes the same steps in PyTorch: slower, not otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.native import Obstacle, compiled

log = logging.getLogger("lorakit")

FOLDER = Path(__file__).parent

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
    "linear": [
        _POINTER,
        _INTEGER,
        _POINTER,
        _INTEGER,
        _INTEGER,
        _POINTER,
        _POINTER,
        _INTEGER,
        *[_POINTER] * 5,
        _INTEGER,
    ],
    "norm": [*[_POINTER] * 3, *[_INTEGER] * 2, *[_REAL] * 2],
    "turn": [_POINTER, *[_INTEGER] * 2, *[_POINTER] * 3, *[_INTEGER] * 3],
    "greatest": [_POINTER, _POINTER, _INTEGER, _INTEGER],
    "gate": [*[_POINTER] * 3, _INTEGER],
}


@functools.cache
def _library(source: str = "native.cpp") -> ctypes.PyDLL | Obstacle:
    try:
        # The interpreter's lock is kept: the calls are short, and giving it up costs up to a switch interval each time.
        return ctypes.PyDLL(str(compiled(FOLDER / source)))
    except (Obstacle, OSError) as problem:
        log.info("serve: the compiled loops are off, %s", problem)
        return problem if isinstance(problem, Obstacle) else Obstacle(str(problem))


@functools.cache
def find(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The compiled function of this name for numbers of this type, or None; `linear` is there only where the processor
    multiplies bfloat16."""
    library = _library("linear.cpp") if name == "linear" else _library()
    if isinstance(library, Obstacle) or dtype not in (torch.float32, torch.bfloat16):
        return None
    function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}", None)
    if function is None:
        return None
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


def alone() -> None:
    """From now on the calling thread computes without helpers; see native.cpp."""
    torch.get_num_threads()  # which sets their number when a thread asks first
    if not isinstance(library := _library(), Obstacle):
        library.alone()


def let_go() -> None:
    """Let the calling thread's helpers go; they come back when it next has work for them."""
    if not isinstance(library := _library(), Obstacle):
        library.let_go()


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
