"""Rows computed by a forward of their own, beside the batch: for adapters that are no change of its linear layers.

Such an adapter stands, by lorakit's own `load`, on a copy of the model's modules that shares all of its tensors, and its rows
run as they run in `generate`: with a cache of their own, in which prompts, prefixes, routers and invocations keep what they
need from one token to the next. So every method that can be loaded can be served; what such a row costs is that it reads the
base's weights for itself. Its pages in the engine's cache are taken and stay empty, so that the memory for keys and values
keeps its bound; nothing of it is shared with other requests.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import adapters
from lorakit.core.using import use
from lorakit.files import store


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model's modules with the model's own tensors. Its configuration is its own, since edits set the attention."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


class Alone:
    """One adapter on modules of its own.

    Args:
        skeleton: the model's modules, with no adapter on them.
        folder: the adapter's.
    """

    def __init__(self, skeleton: nn.Module, folder: Path) -> None:
        self.model: Any = sharing(skeleton).eval()
        adapter = store.load(self.model, folder, name="served", active=False)
        self.method = str(adapter.method.name)
        own = [tensor for one in adapters(self.model).values() for tensor in one.state_dict().values()]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in own)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def cache(self) -> Any:
        """An empty cache of keys and values for one row."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def check(self, weight: float) -> None:
        """LorakitError where the adapter does not act by this weight."""
        with use(self.model, {"served": weight}):
            pass

    def forward(self, tokens: Sequence[int], cache: Any, weight: float, wanted: int) -> Tensor:
        """The logits (wanted, vocabulary) of the last tokens of a row, whose earlier ones the cache holds."""
        ids = torch.tensor([list(tokens)], device=next(self.model.parameters()).device)
        arguments: dict[str, Any] = {"logits_to_keep": max(1, wanted)} if self._keeps else {}
        with torch.inference_mode(), use(self.model, {"served": weight}):
            logits = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, **arguments
            ).logits
        return cast(Tensor, logits[0, logits.shape[1] - wanted :])
