"""A deeper model of the same weights: its blocks in another order, some of them several times.

PEFT's `layer_replication`: [(0, 4), (2, 5)] makes blocks 0, 1, 2, 3, 2, 3, 4 of five. A repeated block shares every tensor
with the first and has adapters of its own, which alone take memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lorakit.errors import LorakitError

_KEPT = "_lorakit_replication"
"""The attribute of a model: the spans that it was replicated by."""


def replication_of(model: nn.Module) -> list[list[int]] | None:
    """The spans by which a model's blocks were replicated; None where they were not."""
    return getattr(model, _KEPT, None)


def replicate_layers(model: nn.Module, spans: Sequence[Sequence[int]]) -> nn.Module:
    """Put the blocks of these spans (start, stop) one after the other in place of the model's, and return the model. It
    stays so; an adapter is attached or loaded afterwards.

    Raises:
        LorakitError: the model's blocks are not found, a span does not fit them, or the model has adapters; it is unchanged
            then.
    """
    given = [[int(start), int(stop)] for start, stop in spans]
    if getattr(model, "_lorakit", None) is not None:
        raise LorakitError("replicate_layers: there are adapters on this model; replicate its layers first.")
    if replication_of(model) is not None:
        raise LorakitError(f"replicate_layers: this model's layers were replicated by {replication_of(model)} already.")
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(places) != 1:
        raise LorakitError(
            f"replicate_layers: {type(model).__name__} has {len(places)} lists of {count} blocks (config.num_hidden_layers), "
            "and one is needed."
        )
    parent, name = places[0]
    blocks = cast(nn.ModuleList, getattr(parent, name))
    for span in given:
        if not 0 <= span[0] < span[1] <= len(blocks):
            raise LorakitError(f"replicate_layers: the span {span} is none of {len(blocks)} blocks (start, stop).")
    order = list(itertools.chain.from_iterable(range(*span) for span in given))
    copies = [_sharing(blocks[index]) for index in order]
    for number, block in enumerate(copies):
        module: Any
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where its keys and values are in a cache
                module.layer_idx = number
    setattr(parent, name, nn.ModuleList(copies))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == len(blocks):
        config.layer_types = [kinds[index] for index in order]
    config.num_hidden_layers = len(copies)
    setattr(model, _KEPT, given)
    return model


def _sharing(block: nn.Module) -> nn.Module:
    """A copy of a block with the very tensors of it."""
    tensors = itertools.chain(block.parameters(), block.buffers())
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
