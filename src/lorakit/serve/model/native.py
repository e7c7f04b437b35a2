"""The inner loops in C++ (`native.cpp`, `linear.cpp`, `stack.cpp`); and why they are off, where they are.

Where there is no compiler, or the model is not on a processor, or its numbers are neither float32 nor bfloat16, the engine
takes the same steps in PyTorch: slower, not otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorakit.native import INTEGER, POINTER, REAL, TYPES, Library
from lorakit.native.library import Obstacle

log = logging.getLogger("lorakit")

LOOPS = Library(
    Path(__file__).with_suffix(".cpp"),
    {
        "attend": (
            *((POINTER, INTEGER, INTEGER) * 3),
            *((POINTER,) * 4),
            *(INTEGER, POINTER, POINTER, INTEGER, POINTER),
            *((INTEGER,) * 5),
            *(REAL, REAL, INTEGER, POINTER),
        ),
        "adapt": (POINTER, INTEGER, POINTER, *[INTEGER] * 3, *[POINTER] * 4, INTEGER),
        "greatest": (POINTER, POINTER, INTEGER, INTEGER),
    },
    holding=True,
)
LINEAR = Library(
    Path(__file__).with_name("linear.cpp"),
    {"linear": (*(POINTER, INTEGER) * 2, INTEGER, POINTER, POINTER, INTEGER, *[POINTER] * 5, INTEGER)},
    holding=True,
)

STACK, LONG_STACK = (
    Library(
        Path(__file__).with_name("stack.cpp"),
        {"stack": (POINTER, POINTER, INTEGER, POINTER, POINTER, INTEGER, *[POINTER] * 4)},
        holding=holding,
    )
    for holding in (True, False)
)
"""The same for steps of few tokens and of many: others wait for the interpreter's lock meanwhile."""


@functools.cache
def _reported(library: Library) -> str | None:
    """Why a library cannot be had, or None; the log says it once."""
    if library.obstacle is not None:
        log.info("serve: the compiled loops are off, %s", library.obstacle)
    return library.obstacle


def find(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The compiled function of this name for numbers of this type, or None; `linear` is there only where the processor
    multiplies bfloat16."""
    library = LINEAR if name == "linear" else LOOPS
    return library.find(name, dtype) if _reported(library) is None else None


def obstacle(model: torch.nn.Module) -> str | None:
    """Why this model is served without the compiled loops, or None."""
    first = next(model.parameters())
    if first.device.type != "cpu":
        return f"the model is on {first.device}"
    if first.dtype not in TYPES:
        return f"its numbers are {first.dtype}"
    return _reported(LOOPS)


def alone() -> None:
    """From now on the calling thread computes without helpers; see native.cpp."""
    torch.get_num_threads()  # which sets their number when a thread asks first
    if not isinstance(library := LOOPS.loaded(), Obstacle):
        library.alone()


def let_go() -> None:
    """Let the calling thread's helpers go; they come back when it next has work for them."""
    if not isinstance(library := LOOPS.loaded(), Obstacle):
        library.let_go()


def padded(count: int) -> int:
    """Numbers that a tensor takes in a block of several: the next begins at a whole cache line."""
    return -(-count // 32) * 32


def large_pages(tensor: Tensor) -> None:
    """Ask Linux to hold a large tensor in pages of 2 MB: what is read here and there then needs no long look-ups."""
    size, advice = 1 << 21, 14  # MADV_HUGEPAGE
    start = -(-tensor.data_ptr() // size) * size
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // size * size
    if length > 0 and tensor.device.type == "cpu" and platform.system() == "Linux":
        # It may say no, which is slower and no more.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def greatest(x: Tensor) -> Tensor:
    """The index of the first of the largest entries of each row of a contiguous x (rows, width)."""
    index = torch.empty(x.shape[0], dtype=torch.int64)
    LOOPS.call("greatest", x.dtype, x, index, *x.shape)
    return index
