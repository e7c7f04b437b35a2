"""The last block of a decoder, only at labelled tokens: nothing reads its output at the others.

Keys and values of every row are needed there, and the sums that attention makes of them; the feed-forward part, three quarters
of a block, is needed only at the rows whose next token has a label. Where few have one (answers of a word to long questions)
that saves three quarters of a block, forward and backward.

`opened(decoder)` gives the last block a shorter forward, taken where a batch says which rows are asked for (`asked`). It is
for blocks of the usual parts, and only where trying shows that those rows come out the same; a block that is watched by
hooks, or routed by rows or tokens, computes every row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layer import Adapted
from lorakit.models.evaluating import evaluating
from lorakit.train.step.packing import PackedBatch

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""The parts of a block that is read as: norm, attention, add, norm, gated layers, add."""

SHARE = 0.5
"""Not worth it where more than this share of the rows is asked about."""

MULTIPLE = 16
"""The rows are filled up to a multiple of this, so that product shapes come again."""

_verdicts: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def asked_rows(decoder: Any, batch: PackedBatch, try_out: Callable[[nn.Module, PackedBatch], Tensor]) -> PackedBatch:
    """`batch` for this decoder: where its last block can leave rows out and that is worth it, `asked` says which remain and
    `hidden_index` counts among them; else it stays as it is.

    `try_out(decoder, batch)` gives the hidden states of a batch; it is called twice the first time, to see that the rows
    come out the same.
    """
    block = _block(decoder)
    asked, place = batch.labelled, batch.labelled_place
    if block is None or not 0 < len(asked) <= SHARE * batch.tokens or not _alone(decoder, block):
        return batch
    fill = asked[-1:].expand(-len(asked) % MULTIPLE)
    cut = dataclasses.replace(batch, asked=torch.cat([asked, fill]), hidden_index=place)
    if decoder not in _verdicts:
        _verdicts[decoder] = _agree(decoder, batch, cut, try_out)
    return cut if _verdicts[decoder] else batch


def _agree(
    decoder: nn.Module, batch: PackedBatch, cut: PackedBatch, try_out: Callable[[nn.Module, PackedBatch], Tensor]
) -> bool:
    with evaluating(decoder):  # dropout would tell the two apart
        whole = try_out(decoder, batch).index_select(0, batch.hidden_index)
        found = try_out(decoder, cut)
    if len(found) == batch.tokens:  # the block was not asked, or did not listen
        return False
    # The same sums in another order: a few roundings.
    return relative_gap(found.index_select(0, cut.hidden_index), whole) <= 16 * torch.finfo(whole.dtype).eps


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected, in double precision."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def _block(decoder: Any) -> nn.Module | None:
    """The last of a decoder's blocks, if it has the usual parts."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    block = layers[-1]
    return block if {name for name, _ in block.named_children()} == PARTS else None


def _alone(decoder: nn.Module, block: nn.Module) -> bool:
    """Nobody else looks at the rows: no hooks on the stack or in the block, no routing by rows or tokens."""
    for module in (decoder, *block.modules()):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if isinstance(module, Adapted):
            routing, routers = module.state.routing, module.state.routers
            if routing.weights is None or not routers.keys().isdisjoint(routing.names):
                return False
    return True


@contextlib.contextmanager
def opened(decoder: Any) -> Iterator[None]:
    """Inside, the last block of `decoder` computes only the rows that a batch asks for. Keep it open around
    backward too: activation checkpointing runs the block again there."""
    block = _block(decoder)
    if block is None or "forward" in vars(block):
        yield
        return
    original = block.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(kwargs.get("packed_batch"), "asked", None)
        if asked is None or args:
            return original(hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        rows = hidden_states.index_select(1, asked) + attended.index_select(1, asked)
        return rows + self.mlp(self.post_attention_layernorm(rows))

    block.forward = MethodType(forward, block)
    try:
        yield
    finally:
        del block.forward
