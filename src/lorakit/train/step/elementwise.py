"""The functions of fusion.py on a processor, compiled ahead (`passes.cpp`).

A call costs a few microseconds where one of torch.compile's costs fifty, and the first step waits for no compiler.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lorakit.native import INTEGER, POINTER, REAL, TYPES, Library

LIBRARY = Library(
    Path(__file__).with_suffix(".cpp"),
    {
        "norm": (*[POINTER] * 4, *[INTEGER] * 2, *[REAL] * 2),
        "norm_backward": (*[POINTER] * 5, *[INTEGER] * 2, REAL),
        "gate": (*[POINTER] * 3, *[INTEGER] * 2),
        "gate_backward": (*[POINTER] * 5, *[INTEGER] * 2),
        "turn": (*[POINTER] * 4, *[INTEGER] * 4),
        "gain_backward": (*[POINTER] * 5, *[INTEGER] * 3),
    },
)

WIDTH = 16
"""Widths must be multiples of this: the floats of one vector."""


def suit(tensors: tuple[Tensor | None, ...], halves: bool = False, masters: bool = False) -> bool:
    """Can the compiled functions take these: contiguous, on a processor, of one type and of a width that vectors fill?

    `halves`: half of it must be so, for rotary positions. Columns of statistics may be float32 beside any type; with `masters`
    vectors may too.
    """
    first = tensors[0]
    assert first is not None  # every function has an input
    if first.device.type != "cpu" or first.dtype not in TYPES or LIBRARY.obstacle is not None:
        return False
    for one in tensors:
        if one is None or not one.is_contiguous():
            return False
        if one.dtype == torch.float32 and one.shape[-1] == 1:
            continue
        if one.shape[-1] % (2 * WIDTH if halves else WIDTH):
            return False
        if one.dtype != first.dtype and not (masters and one.ndim == 1 and one.dtype == torch.float32):
            return False
    return True


def norm(x: Tensor, weight: Tensor, *, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    """`fusion.norm_rows`."""
    y, scale = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    LIBRARY.call("norm", x.dtype, x, weight, y, scale, x.shape[0], x.shape[1], eps, shift)
    return y, scale


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, shift: float) -> Tensor:
    """`fusion.norm_rows_backward`."""
    dx = torch.empty_like(x)
    LIBRARY.call("norm_backward", grad.dtype, grad, x, weight, scale, dx, x.shape[0], x.shape[1], shift)
    return dx


def gate(tanh: bool, gate: Tensor, up: Tensor) -> Tensor:
    """`fusion.gate_silu`, or `gate_gelu` with `tanh`."""
    y = torch.empty_like(gate)
    LIBRARY.call("gate", gate.dtype, gate, up, y, gate.numel(), int(tanh))
    return y


def gate_backward(tanh: bool, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Their derivatives."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    LIBRARY.call("gate_backward", grad.dtype, grad, gate, up, of_gate, of_up, gate.numel(), int(tanh))
    return of_gate, of_up


def turn(back: bool, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`fusion.rotate`, or `rotate_back`."""
    y = torch.empty_like(x)
    LIBRARY.call("turn", x.dtype, x, cos, sin, y, *x.shape, int(back))
    return y


def gain_backward(dy: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`kernel.gain_backward`."""
    of_y, of_g = torch.empty_like(y), torch.empty_like(g, dtype=torch.float32)
    workers = min(torch.get_num_threads(), y.shape[0])
    LIBRARY.call("gain_backward", dy.dtype, dy, y, g.float(), of_y, of_g, *y.shape, workers)
    return of_y, of_g
