"""Activated LoRA: LoRA that acts from its invocation tokens on, so that all before them is the base model's.

    y_t = W x_t + b + [t >= start] s B A x_t          start: where the invocation tokens begin, the last time that they occur

The keys and values of a text up to the invocation are then those of the base, and a cache that the base has filled is used
as it is: ask the base, append the invocation to its cache, and the adapter answers. A row without the invocation runs as the
base. What is generated after it is the adapter's, whatever it is. It is no change of a weight and cannot be merged.
Greenewald et al. 2025, arXiv 2504.12397.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.delta import Call, Card, Shape
from lorakit.core.hooks import CallHooks
from lorakit.core.layer import Adapted
from lorakit.core.options import option
from lorakit.core.routing import Router, Routing
from lorakit.core.state import ModelState
from lorakit.errors import LorakitError
from lorakit.experts.context import decoder_of, on_tokens
from lorakit.methods.lora import LoRADelta, LoRAOptions


@dataclass(frozen=True, kw_only=True)
class ALoRA(LoRAOptions):
    """The options of Activated LoRA."""

    name = "alora"
    delta = LoRADelta
    card = Card(
        title="Activated LoRA",
        formula="ΔW x = s B A x from the invocation tokens on, 0 before",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_),
        paper="arXiv 2504.12397",
        use="When many adapters are to answer about one text whose key-value cache they share.",
        limits="It acts by token, so it cannot be merged; rows are not packed.",
    )

    invocation: tuple[int, ...] = option(
        (),
        "the tokens from whose start on the adapter acts",
        minimum=0,
        peft="alora_invocation_tokens",
        from_peft=tuple,
    )

    def __post_init__(self) -> None:
        given: Any = self.invocation
        if not isinstance(given, str | int):
            object.__setattr__(self, "invocation", tuple(given))
        super().__post_init__()

    def check(self, shape: Shape, path: str) -> None:
        super().check(shape, path)
        if not self.invocation:
            raise LorakitError(
                "attach: alora was given no invocation tokens; they are what the tokenizer makes of the text from which on "
                "the adapter acts: ALoRA(invocation=tokenizer.encode(text, add_special_tokens=False))."
            )
        if shape.lookup or shape.taps > 1:
            raise LorakitError(f"attach: alora acts by token on linear layers, and {path} is none; leave it out.")

    def install(
        self, name: str, model: nn.Module, layers: Mapping[str, nn.Module]
    ) -> tuple[nn.Module | None, list[RemovableHandle]]:
        state = cast(Adapted, next(iter(layers.values()))).state
        router = Invocation(self.invocation, name, state)
        state.routers[name] = router
        return router, CallHooks(router.enter, router.leave).on(decoder_of(model) or model)


class Invocation(Router):
    """Weighs an adapter by 1 from its invocation tokens on, and by 0 before. It holds no tensors."""

    whole_rows = True

    def __init__(self, tokens: tuple[int, ...], name: str, state: ModelState) -> None:
        super().__init__((name,))
        self.tokens, self.name, self.state = tokens, name, state

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the tokens for which the adapter acts, for all layers of this call of the model."""
        before = self.state.routing
        if self.name not in before.names:
            return None
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise LorakitError(
                f"use: adapter {self.name!r} acts from its invocation tokens on, and the model was called without input_ids, "
                "in which alone they can be found."
            )
        active = _active(kwargs.get("past_key_values"), self.name, ids)
        found = active[:, None] | (torch.arange(ids.shape[1], device=ids.device) >= starts(ids, self.tokens)[:, None])
        self.state.routing = dataclasses.replace(before, found={**before.found, self.name: found})
        return args, kwargs, (before, found[:, -1])

    def leave(self, kept: tuple[Routing, Tensor], output: Any) -> None:
        """Keep with the cache which rows the adapter acts on from here."""
        self.state.routing, active = kept
        cache = getattr(output, "past_key_values", None)
        if cache is not None and hasattr(cache, "__dict__"):
            cache.__dict__.setdefault(_KEPT, {})[self.name] = active

    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        if found is None:
            raise LorakitError(
                f"use: {layer} was called outside a call of the model, so that it is not known where the invocation tokens "
                "are. Call the model itself; when training, gradient checkpointing does this too (train.memory: fast)."
            )
        return on_tokens(found[..., None].to(torch.promote_types(call.dtype, torch.float32)), call.leading, layer)


_KEPT = "_lorakit_invoked"
"""The attribute of a cache: adapter -> (rows,), whether it acts on what follows."""


def _active(cache: Any, name: str, ids: Tensor) -> Tensor:
    """(rows,): whether the adapter acts already on what a cache holds last."""
    held: Tensor | None = getattr(cache, "__dict__", {}).get(_KEPT, {}).get(name)
    if held is None or not cache.get_seq_length():
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    return held.to(ids.device).repeat_interleave(
        max(1, ids.shape[0] // held.shape[0])
    )  # beams of a row follow each other


def starts(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(rows,): where `tokens` begin in each row of `ids` for the last time; the row's length where they do not occur."""
    length = ids.shape[1]
    if length < len(tokens):
        return ids.new_full((ids.shape[0],), length)
    wanted = torch.tensor(tokens, device=ids.device)
    places = torch.arange(length - len(tokens) + 1, device=ids.device)
    hits = (ids.unfold(1, len(tokens), 1) == wanted).all(-1)
    last = torch.where(hits, places, -1).amax(1)
    return torch.where(last < 0, length, last)
