"""Elementwise operations of a transformer and their derivatives: RMSNorm, gated activations, rotary positions.

Each is written once in plain PyTorch, which every device and dtype takes and torch.compile fuses, once in C++ for
processors (`elementwise.cpp`): there a call costs a few microseconds where one of torch.compile's costs fifty, and waits for
no compiler; and once in Triton for GPUs (`triton/elementwise.py`). All round where the modules of transformers round, so that
they stand in for these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.native import triton
from lorakit.native.library import INTEGER, POINTER, REAL, TYPES, Library

LIBRARY = Library(
    Path(__file__).with_suffix(".cpp"),
    {
        "norm": (*[POINTER] * 4, *[INTEGER] * 2, *[REAL] * 2),
        "norm_backward": (*[POINTER] * 5, *[INTEGER] * 2, REAL),
        "gate": (*[POINTER] * 3, *[INTEGER] * 2),
        "gate_backward": (*[POINTER] * 5, *[INTEGER] * 2),
        "turn": (POINTER, *[INTEGER] * 2, *[POINTER] * 3, *[INTEGER] * 4),
        "gain_backward": (*[POINTER] * 5, *[INTEGER] * 3),
    },
    holding=True,
)

WIDTH = 16
"""Where a derivative is asked for, widths must be multiples of this: the floats of one vector."""


# -- in PyTorch ------------------------------------------------------------------------------------------------------------


def wide(tensor: Tensor) -> Tensor:
    """In float32, or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def norm_rows(x: Tensor, weight: Tensor, *, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    """x [tokens, hidden] -> (normalised rows, 1 / root mean square [tokens, 1]). `shift` is 1 for Gemma, else 0."""
    x32 = wide(x)
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if shift:
        return (x32 * scale * (wide(weight) + shift)).to(x.dtype), scale
    return (x32 * scale).to(x.dtype) * weight, scale


def norm_rows_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, shift: float) -> Tensor:
    """The gradient of x."""
    unit = wide(x) * scale
    inner = wide(grad) * (wide(weight) + shift)
    return (scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))).to(x.dtype)


def gate_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(wide(gate)).to(gate.dtype) * up


def gate_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    g, x = wide(grad), wide(gate)
    sigmoid = torch.sigmoid(x)
    of_gate = g * wide(up) * sigmoid * (1 + x * (1 - sigmoid))
    return of_gate.to(gate.dtype), (g * x * sigmoid).to(gate.dtype)


def gate_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, in the tanh form of Gemma."""
    return functional.gelu(wide(gate), approximate="tanh").to(gate.dtype) * up


def gate_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    g, x = wide(grad), wide(gate)
    slope = (2 / torch.pi) ** 0.5
    tanh = torch.tanh(slope * (x + 0.044715 * x**3))
    of_gelu = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope * (1 + 3 * 0.044715 * x**2)
    return (g * wide(up) * of_gelu).to(gate.dtype), (g * 0.5 * x * (1 + tanh)).to(gate.dtype)


GATES: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
    "silu": (gate_silu, gate_silu_backward),
    "gelu_tanh": (gate_gelu, gate_gelu_backward),
}
"""Gated activations by name, each with its derivative."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, d] turned by the angles [tokens, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (wide(x) * wide(cos[:, None]) + wide(turned) * wide(sin[:, None])).to(x.dtype)


def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `rotate`, for any angles (the two halves of cos and sin need not agree)."""
    half = grad.shape[-1] // 2
    g = wide(grad)
    weighted = g * wide(sin[:, None])
    turned = torch.cat((weighted[..., half:], -weighted[..., :half]), dim=-1)
    return (g * wide(cos[:, None]) + turned).to(grad.dtype)


# -- in C++, or on a GPU in Triton -----------------------------------------------------------------------------------------


def suit(tensors: tuple[Tensor | None, ...], halves: bool = False, masters: bool = False) -> bool:
    """Can the C++ functions and their derivatives take these: contiguous, on a processor, of one type and of a width that
    vectors fill?

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


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Are there `norm`, `gate` and `turn` for numbers of this type on this device?"""
    return LIBRARY.find("norm", dtype) is not None if device.type == "cpu" else triton.obstacle(device, dtype) is None


def _kernels() -> Any:
    from lorakit.native.triton import elementwise

    return elementwise


def norm(x: Tensor, weight: Tensor, eps: float, shift: float, scale: Tensor | None = None) -> Tensor:
    """RMSNorm over the last axis of a contiguous x (..., width) of any width. `scale` is filled with 1 / root mean square."""
    width = x.shape[-1]
    if x.is_cuda:
        return _kernels().norm(x.view(-1, width), weight, eps=eps, shift=shift)[0].view(x.shape)  # type: ignore[no-any-return]
    y = torch.empty_like(x)
    LIBRARY.call("norm", x.dtype, x, weight, y, scale, x.numel() // width, width, eps, shift)
    return y


def gate(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up of two contiguous tensors of one shape, for an activation of `GATES`."""
    if gate.is_cuda:
        return _kernels().gate(kind, gate, up)  # type: ignore[no-any-return]
    y = torch.empty_like(gate)
    LIBRARY.call("gate", gate.dtype, gate, up, y, gate.numel(), kind == "gelu_tanh")
    return y


def turn(x: Tensor, cosine: Tensor, sine: Tensor, back: bool = False) -> Tensor:
    """Rotary positions: x (1, heads, tokens, d) turned by contiguous angles (tokens, d); the result lies tokens first in
    memory. `back` is the transpose of that."""
    if x.is_cuda:
        return _kernels().turn(x[0].transpose(0, 1), cosine, sine, back)[None].transpose(1, 2)  # type: ignore[no-any-return]
    _, heads, tokens, d = x.shape
    y = x.new_empty(1, tokens, heads, d)
    LIBRARY.call("turn", x.dtype, x, x.stride(1), x.stride(2), cosine, sine, y, heads, tokens, d, back)
    return y.transpose(1, 2)


def gain_backward(dy: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """dy, y (rows, width), g (width) -> dy * g, and the sum over rows of dy * y in float32."""
    of_y, of_g = torch.empty_like(y), torch.empty_like(g, dtype=torch.float32)
    workers = min(torch.get_num_threads(), y.shape[0])
    LIBRARY.call("gain_backward", dy.dtype, dy, y, g.float(), of_y, of_g, *y.shape, workers)
    return of_y, of_g


def _norm_rows(x: Tensor, weight: Tensor, *, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return norm(x, weight, eps, shift, scale), scale


def _norm_rows_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, shift: float) -> Tensor:
    dx = torch.empty_like(x)
    LIBRARY.call("norm_backward", grad.dtype, grad, x, weight, scale, dx, *x.shape, shift)
    return dx


def _gate_backward(kind: str, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    LIBRARY.call("gate_backward", grad.dtype, grad, gate, up, of_gate, of_up, gate.numel(), kind == "gelu_tanh")
    return of_gate, of_up


def _rotate(back: bool, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty_like(x)
    tokens, heads, d = x.shape
    LIBRARY.call("turn", x.dtype, x, d, heads * d, cos, sin, y, heads, tokens, d, back)
    return y


COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {
    norm_rows: _norm_rows,
    norm_rows_backward: _norm_rows_backward,
    gate_silu: partial(gate, "silu"),
    gate_silu_backward: partial(_gate_backward, "silu"),
    gate_gelu: partial(gate, "gelu_tanh"),
    gate_gelu_backward: partial(_gate_backward, "gelu_tanh"),
    rotate: partial(_rotate, False),
    rotate_back: partial(_rotate, True),
}
"""A function in PyTorch -> the same in C++, for tensors that `suit`."""


def kernel(function: Callable[..., Any], tensors: tuple[Tensor | None, ...]) -> Callable[..., Any] | None:
    """A function in PyTorch as a Triton kernel, where there is one and these tensors suit: contiguous, of one type on
    one GPU."""
    first = tensors[0]
    if first is None or function not in COMPILED or triton.obstacle(first.device, first.dtype) is not None:
        return None
    for one in tensors:
        if one is None or not one.is_contiguous() or not (one.dtype == first.dtype or one.shape[-1] == 1):
            return None
    own = _kernels()
    kernels: dict[Callable[..., Any], Callable[..., Any]] = {
        norm_rows: own.norm,
        norm_rows_backward: own.norm_backward,
        gate_silu: partial(own.gate, "silu"),
        gate_silu_backward: partial(own.gate_backward, "silu"),
        gate_gelu: partial(own.gate, "gelu_tanh"),
        gate_gelu_backward: partial(own.gate_backward, "gelu_tanh"),
        rotate: own.turn,
        rotate_back: partial(own.turn, back=True),
    }
    return kernels.get(function)
