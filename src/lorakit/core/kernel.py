"""The one gated low-rank product, `y += ((x Aᵀ) ⊙ g) Bᵀ`, forward and backward.

Every method of the low-rank family, every blend, every batch whose rows use different adapters is this product with
another gate `g`. The backward is written by hand so that nothing is kept that can be had cheaply:

- x is saved as it came (the same tensor that q, k and v share, so it is held once), or not at all where A is frozen;
- dropout keeps a seed and draws its mask again;
- the scale multiplies the rank-wide product, not the output;
- the base layer's product is inside, so that the input's gradient is one accumulation and not a sum of two tensors;
- the adapter's masters come as they are and their gradients leave in the masters' dtype, so that no cast is a node.

`gained` is the other product an adapter may be: every output feature times a trained number of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _keep_mask(like: Tensor, rows: int, columns: int, dropout: float, seed: int) -> Tensor:
    """The dropout mask of this seed, already divided by the keep probability.

    It is always contiguous: random numbers are drawn in the order of memory, so that a mask laid out as a strided input
    is would be another one when the backward draws it again.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = 1.0 - dropout
    return like.new_empty(rows, columns).bernoulli_(keep, generator=generator).div_(keep)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast would give a linear layer's input."""
    device = x.device.type
    if device == "meta":  # shapes without content, which autocast does not know
        return x
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _reduce(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient summed down to the shape that broadcasting stretched."""
    return gradient.sum_to_size(like.shape)


class _Product(Function):
    """`x Wᵀ + b + s ((drop(x) Aᵀ) ⊙ g) Bᵀ` over the last axis; W and b may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        B: Tensor,
        A: Tensor,
        gate: Tensor | None,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        leading, rank = x.shape[:-1], A.shape[0]
        ctx.masters = B.dtype, A.dtype
        B, A = B.to(x.dtype), A.to(x.dtype)
        flat = x.reshape(leading.numel(), x.shape[-1])
        dropped = flat * _keep_mask(flat, flat.shape[0], flat.shape[1], dropout, seed) if dropout else flat
        h = dropped @ A.T
        gated = h if gate is None else (h.view(*leading, rank) * gate).view_as(h)
        if W is None:
            y = (gated @ B.T).mul_(scale)
        else:  # of x as it lies: of its rows, an expanded x would be multiplied by another loop, with other last bits. In
            # place: addmm would copy its first argument into a new tensor
            y = F.linear(x, W, b).reshape(flat.shape[0], B.shape[0]).addmm_(gated, B.T, alpha=scale)
        needs_x = ctx.needs_input_grad[4]
        needs_h = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
        ctx.save_for_backward(x if needs_x else None, h if needs_h else None, W, B, A, gate)
        ctx.scale, ctx.dropout, ctx.seed, ctx.shape = scale, dropout, seed, x.shape
        # no view: models change a layer's output in place (residuals, masks), which autograd forbids on a view made in here
        return torch.ops.aten._unsafe_view(y, [*leading, B.shape[0]])  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, W, B, A, gate = ctx.saved_tensors
        scale: float = ctx.scale
        leading, features, rank = ctx.shape[:-1], ctx.shape[-1], A.shape[0]
        flat_dy = dy.reshape(leading.numel(), dy.shape[-1])
        dx = db = dB = dA = dgate = None
        into = flat_dy @ B  # (tokens, rank)
        spread = None if gate is None else gate.expand(*leading, rank).reshape(into.shape)
        if ctx.needs_input_grad[3]:
            dB = (flat_dy.T @ (h if spread is None else h * spread)).mul_(scale)
        if gate is not None and ctx.needs_input_grad[5]:
            dgate = _reduce((into * h).view(*leading, rank), gate).mul(scale)
        dh = into.mul_(scale) if spread is None else (into * spread).mul_(scale)
        mask = None
        if ctx.dropout and (ctx.needs_input_grad[0] or ctx.needs_input_grad[4]):
            mask = _keep_mask(flat_dy, flat_dy.shape[0], features, ctx.dropout, ctx.seed)
        if ctx.needs_input_grad[4]:
            flat = x.reshape(leading.numel(), features)
            dA = dh.T @ (flat if mask is None else flat * mask)
        if ctx.needs_input_grad[0]:
            if W is None:
                dx = dh @ A if mask is None else (dh @ A).mul_(mask)
            elif mask is None:
                dx = (flat_dy @ W).addmm_(dh, A)
            else:
                dx = (flat_dy @ W).add_((dh @ A).mul_(mask))
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[2]:
            db = flat_dy.sum(0)
        of_B, of_A = ctx.masters
        dB, dA = None if dB is None else dB.to(of_B), None if dA is None else dA.to(of_A)
        return dx, None, db, dB, dA, dgate, None, None, None


def product(
    x: Tensor,
    B: Tensor,
    A: Tensor,
    gate: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    W: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """`x Wᵀ + b + scale · ((drop(x) Aᵀ) ⊙ gate) Bᵀ`.

    Args:
        x: (..., in).
        B: (out, rank), in x's dtype or the wider one of its master; its gradient comes in that.
        A: (rank, in), likewise.
        gate: broadcastable to (..., rank), or None for 1. One vector: AdaLoRA's Λ, VeRA's d. One row per batch entry:
            every row its own adapter. One per token: a mixture.
        scale: a constant that multiplies the product.
        dropout: probability with which an input of A is zeroed (the base sees all of them).
        W: (out, in), the frozen base weight, or None for the product alone. It gets no gradient.
        b: (out,), the base's bias.

    Returns:
        (..., out), in x's dtype, or autocast's where that is on.
    """
    cast = autocast(x)
    if cast is not x:
        x = cast
        gate, W, b = (None if tensor is None else tensor.to(x.dtype) for tensor in (gate, W, b))
    if dropout >= 1.0:
        return F.linear(x, W, b) if W is not None else x.new_zeros(*x.shape[:-1], B.shape[0])
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0
    return _Product.apply(x, W, b, B, A, gate, scale, dropout, seed)  # type: ignore[no-any-return, no-untyped-call]


# ---------------------------------------------------------------------------------------------------------------
# A number for each output feature

_small: Callable[..., Any] | None = None


@contextmanager
def small_functions(run: Callable[..., Any]) -> Iterator[None]:
    """Within the block functions of one pass over memory go through `run(function, *tensors)`, which may compile them."""
    global _small
    before, _small = _small, run
    try:
        yield
    finally:
        _small = before


def gain_backward(dy: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """dy, y (tokens, out), g (out,) -> the gradients of y, and of g in float32 or better."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    slope = dy.to(wide)
    return (slope * g.to(wide)).to(dy.dtype), (slope * y.to(wide)).sum(0)


class _Gain(Function):
    """`y ⊙ g`; both gradients in one pass over dy where small functions are compiled."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(y, g)
        return y * g.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, g = ctx.saved_tensors
        columns = dy.shape[-1]
        flat = dy.reshape(-1, columns), y.reshape(-1, columns), g
        of_y, of_g = gain_backward(*flat) if _small is None else _small(gain_backward, *flat)
        return of_y.view(dy.shape), of_g.to(g.dtype)


def gained(y: Tensor, g: Tensor) -> Tensor:
    """`y ⊙ g`: y (..., out), g (out,), possibly wider than y. In y's dtype."""
    return _Gain.apply(y, g)  # type: ignore[no-any-return, no-untyped-call]
