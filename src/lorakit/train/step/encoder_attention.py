"""An encoder's attention over a packed batch of whole texts. Padding exists in here alone: texts are short."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.train.step.packing import PackedTexts


class _Move(torch.autograd.Function):
    """Rows to places of a larger tensor, zeros between, or back from them. Places are distinct, so nothing adds up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, size: int | None) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows, ctx.spreads = rows.shape[0], size is not None
        if size is None:
            return rows.index_select(0, place)
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, place, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        if ctx.spreads:
            return grad.index_select(0, place), None, None
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, place, grad), None, None


class _Drop(torch.autograd.Function):
    """Zeros instead of a share of the numbers. The others are not scaled up: what they are multiplied with is smaller.

    Sixteen random bits decide each, to 1 in 65,536 of the share; drawing them is several times as fast as torch's own
    Bernoulli numbers, which were a tenth of a step here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(share * 2**16) - 2**15
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return grads[0] * kept, None


def attend_both_ways(
    batch: PackedTexts,
    module: torch.nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    dropout: float,
    scaling: float | None,
    given: dict[str, Any],
) -> Tensor:
    """Each text sees all of itself. heads: `[1, heads, tokens, head_dim]` each -> `[1, tokens, heads, head_dim]`.

    Raises ValueError for a causal layer, a bias on positions, or key heads that several query heads share.
    """
    if getattr(module, "is_causal", False) or given.get("is_causal"):
        raise ValueError("packed attention: this layer is causal, but the batch holds texts for an encoder")
    if given.get("position_bias") is not None or heads[1].shape[1] != heads[0].shape[1]:
        raise ValueError(
            "packed attention: an encoder with position bias or shared key heads; use train.fast_path: off"
        )
    _, count, tokens, d = heads[0].shape
    if tokens != batch.tokens:
        raise ValueError(f"packed attention: {tokens} queries are not one row of {batch.tokens} tokens")
    texts, _, longest = batch.hidden.shape
    if count not in batch.plans:
        text, step = batch.place // longest, batch.place % longest
        row = (text[:, None] * count + torch.arange(count, device=text.device)) * longest + step[:, None]
        wide = batch.hidden[:, None].expand(texts, count, 1, longest).reshape(texts * count, 1, longest)
        bias = torch.zeros(wide.shape, dtype=heads[0].dtype, device=wide.device).masked_fill_(wide, float("-inf"))
        batch.plans[count] = row.view(-1), bias
    place, bias = batch.plans[count]
    size = texts * count * longest
    q, k, v = (
        _Move.apply(one[0].transpose(0, 1).reshape(-1, d), place, size).view(-1, longest, d)  # type: ignore[no-untyped-call]
        for one in heads
    )
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5 if scaling is None else float(scaling))
    p = scores.softmax(-1)
    if dropout:
        p = _Drop.apply(p, dropout)  # type: ignore[no-untyped-call]
    out: Tensor = _Move.apply(torch.bmm(p, v).view(-1, d), place, None)  # type: ignore[no-untyped-call]
    return (out / (1 - dropout) if dropout else out).view(1, tokens, count, d)
