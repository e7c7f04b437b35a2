"""RMSNorm, gated activations and rotary positions as Triton kernels; `native/elementwise.py` has the functions they compute.

They round where those do.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.native.triton import power

FLAT = 1024
"""Numbers of one program of a function without rows."""


@triton.jit
def _norm(x, weight, y, scale, width, eps, shift, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < width
    own = tl.load(x + row * width + at, mask=real, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    unit = 1.0 / tl.sqrt(tl.sum(own * own, 0) / width + eps)
    kind = y.dtype.element_ty
    result = own * unit * (factor + shift) if SHIFTED else (own * unit).to(kind).to(tl.float32) * factor
    tl.store(y + row * width + at, result.to(kind), mask=real)
    tl.store(scale + row, unit)


@triton.jit
def _norm_backward(grad, x, weight, scale, dx, width, shift, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < width
    own = tl.load(x + row * width + at, mask=real, other=0.0).to(tl.float32)
    given = tl.load(grad + row * width + at, mask=real, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=real, other=0.0).to(tl.float32) + shift
    unit = tl.load(scale + row)
    normal, inner = own * unit, given * factor
    result = unit * (inner - normal * (tl.sum(inner * normal, 0) / width))
    tl.store(dx + row * width + at, result.to(dx.dtype.element_ty), mask=real)


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _gate(gate, up, y, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    own = tl.load(gate + at, mask=real, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
    if TANH:
        active = 0.5 * own * (1.0 + _tanh(0.7978845608028654 * (own + 0.044715 * own * own * own)))
    else:
        active = own / (1.0 + tl.exp(-own))
    kind = y.dtype.element_ty
    tl.store(y + at, (active.to(kind).to(tl.float32) * other).to(kind), mask=real)


@triton.jit
def _gate_backward(grad, gate, up, of_gate, of_up, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    given = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
    own = tl.load(gate + at, mask=real, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
    if TANH:
        bent = _tanh(0.7978845608028654 * (own + 0.044715 * own * own * own))
        active = 0.5 * own * (1.0 + bent)
        slope = 0.5 * (1.0 + bent) + 0.5 * own * (1.0 - bent * bent) * 0.7978845608028654 * (1.0 + 0.134145 * own * own)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-own))
        active = own * sigmoid
        slope = sigmoid * (1.0 + own * (1.0 - sigmoid))
    kind = of_gate.dtype.element_ty
    tl.store(of_gate + at, (given * other * slope).to(kind), mask=real)
    tl.store(of_up + at, (given * active).to(kind), mask=real)


@triton.jit
def _turn(
    x, by_head, by_token, cosine, sine, y, heads, half, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    real = (head < heads) & (at < half)
    angle, inside = token * 2 * half + at, at < half
    c1 = tl.load(cosine + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cosine + angle + half, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sine + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sine + angle + half, mask=inside, other=0.0).to(tl.float32)
    place = x + token * by_token + head * by_head + at
    one = tl.load(place, mask=real, other=0.0).to(tl.float32)
    two = tl.load(place + half, mask=real, other=0.0).to(tl.float32)
    if BACK:
        first, second = one * c1 + two * s2, two * c2 - one * s1
    else:
        first, second = one * c1 - two * s1, two * c2 + one * s2
    to = y + (token * heads + head) * 2 * half + at
    kind = y.dtype.element_ty
    tl.store(to, first.to(kind), mask=real)
    tl.store(to + half, second.to(kind), mask=real)


def norm(x: Tensor, weight: Tensor, *, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    """`norm_rows` of contiguous x (rows, width)."""
    rows, width = x.shape
    y, scale = torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    if rows:
        _norm[rows,](x, weight, y, scale, width, eps, shift, SHIFTED=bool(shift), BLOCK=power(width))
    return y, scale


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, shift: float) -> Tensor:
    """`norm_rows_backward`, all contiguous."""
    dx = torch.empty_like(x)
    if len(x):
        _norm_backward[len(x),](grad, x, weight, scale, dx, x.shape[1], shift, BLOCK=power(x.shape[1]))
    return dx


def gate(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """A gated activation of `GATES`, both contiguous."""
    y = torch.empty_like(gate)
    if count := gate.numel():
        _gate[triton.cdiv(count, FLAT),](gate, up, y, count, TANH=kind == "gelu_tanh", BLOCK=FLAT)
    return y


def gate_backward(kind: str, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Its derivative, all contiguous."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    if count := gate.numel():
        grid = (triton.cdiv(count, FLAT),)
        _gate_backward[grid](grad, gate, up, of_gate, of_up, count, TANH=kind == "gelu_tanh", BLOCK=FLAT)
    return of_gate, of_up


def turn(x: Tensor, cosine: Tensor, sine: Tensor, back: bool = False) -> Tensor:
    """`rotate`, or `rotate_back`, of x (tokens, heads, d), whose last axis is contiguous; the result is contiguous."""
    tokens, heads, d = x.shape
    y = x.new_empty(tokens, heads, d)
    if y.numel():
        sizes = {"ROWS": power(heads), "BLOCK": power(d // 2)}
        _turn[tokens,](x, x.stride(1), x.stride(0), cosine, sine, y, heads, d // 2, BACK=back, **sizes)
    return y
