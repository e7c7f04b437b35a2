"""Two-pass routers: the base model alone runs over the tokens first, and its last hidden states decide.

Both passes are one call to whoever runs the model. With a key-value cache each pass has its own: the caller's is the
routed pass's, and a second one for the base is kept with it, so that a cached step gives what the whole text would.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.hooks import CallHooks
from lorakit.core.routing import BASE, Routing
from lorakit.errors import LorakitError
from lorakit.experts.context import OverAdapters, RouterContext

_ROWS = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""Methods of a cache that change its rows and tokens; the base's cache must follow."""


class TwoPassRouter(OverAdapters):
    """A router that reads the base model's last hidden states."""

    def watch(self, context: RouterContext) -> list[RemovableHandle]:
        self.name, self._decoder = context.name, (context.decoder(),)
        return CallHooks(self._enter, self._leave).on(self._decoder[0])

    @property
    def decoder(self) -> nn.Module:
        return self._decoder[0]

    @abstractmethod
    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], memory: dict[str, Any] | None) -> Tensor:
        """What the router finds for one call of the decoder; `memory` is what is kept with the call's cache, if any."""

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self.state.routing
        if self.name not in before.names:
            return None
        kwargs = self._with_cache(kwargs)
        cache = kwargs.get("past_key_values")
        memory = None if cache is None else _memory(cache, self.name)
        self.state.routing = BASE
        try:
            found = self.find(args, kwargs, memory)
        finally:
            self.state.routing = before
        self.state.routing = dataclasses.replace(before, found={**before.found, self.name: found})
        return args, kwargs, before

    def _leave(self, before: Routing, output: Any) -> None:
        self.state.routing = before

    def _with_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call with a cache in it where the decoder would make one, so that what belongs to it has a place."""
        config = getattr(self.decoder, "config", None)
        wanted = kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", False) and not self.decoder.training if wanted is None else wanted
        if not wanted or kwargs.get("past_key_values") is not None:
            return kwargs
        from transformers import DynamicCache

        return {**kwargs, "past_key_values": DynamicCache(config=cast(Any, config))}

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any], memory: dict[str, Any] | None) -> Tensor:
        """The base model's last hidden states for the tokens of this call, (batch, tokens, hidden)."""
        own = {**kwargs, "past_key_values": None, "use_cache": False}
        if memory is not None:
            own |= {"past_key_values": memory["cache"], "use_cache": True}
        with torch.no_grad():
            return cast(Tensor, self.decoder(*args, **own).last_hidden_state)

    def found_or_refuse(self, found: Tensor | None, layer: str) -> Tensor:
        """What `find` found; LorakitError where a layer runs outside such a call."""
        if found is None:
            raise LorakitError(
                f"use: {layer} was called outside a call of the model's decoder, so its router has seen no hidden states. "
                "Call the model itself; when training, gradient checkpointing does this too (train.memory: fast)."
            )
        return found


def _memory(cache: Any, name: str) -> dict[str, Any]:
    """What is kept with a cache for one router: the base's own cache, and whatever the router adds."""
    held = cache.__dict__.get("_lorakit")
    if held is None or name not in held:
        if cache.get_seq_length():
            raise LorakitError(
                f"use: the key-value cache holds {cache.get_seq_length()} tokens that ran without router {name!r}, which "
                "needs the base model's too; start with an empty cache, or route all calls of one text alike."
            )
        empty = copy.deepcopy(cache) if held is None else copy.deepcopy(held[""])
        if held is None:
            held = cache.__dict__["_lorakit"] = {"": copy.deepcopy(empty)}
            for method in _ROWS:
                if hasattr(cache, method):
                    setattr(cache, method, _Both(cache, method))
        held[name] = {"cache": empty}
    return cast("dict[str, Any]", held[name])


class _Both:
    """A method of a cache that is also called on the bases' caches kept with it."""

    def __init__(self, cache: Any, method: str) -> None:
        self.cache, self.method, self.own = cache, method, getattr(cache, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name, memory in self.cache.__dict__["_lorakit"].items():
            if name:
                getattr(memory["cache"], self.method)(*args, **kwargs)
        return self.own(*args, **kwargs)
