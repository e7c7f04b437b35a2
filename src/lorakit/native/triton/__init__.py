"""Kernels for GPUs, in Triton: what the C++ loops are on processors.

Each computes what a function in PyTorch computes, which stays as its oracle and stands in where Triton is missing.
Which of the two runs is measured on the user's GPU (`native/choice.py`). The modules that hold kernels are imported
when a GPU first needs them.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The numbers that the kernels take."""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors like these, or None."""
    if device.type != "cuda":
        return f"there are no Triton kernels on {device.type} devices"
    if dtype not in TYPES:
        return f"the Triton kernels take no {dtype}"
    return None if _installed() else "triton is not installed"


def power(number: int, least: int = 1) -> int:
    """The least power of two that is not below either number: sizes of blocks are such."""
    return max(least, 1 << max(0, number - 1).bit_length())
