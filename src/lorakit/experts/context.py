"""The context of a router: the model, the adapters that it routes, and the layers that these change.

A router's spec (`RouterSpec`) is a method's spec that changes no weight of its own: it makes a `routing.Router` over
adapters that are on the model already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.adapter.adapter import adapters_of
from lorakit.core.delta import Delta, Method, Pool, Shape
from lorakit.core.layer import Adapted
from lorakit.core.layout import Convolution, Site
from lorakit.core.routing import Router
from lorakit.core.state import ModelState
from lorakit.errors import LorakitError

MEMBERS = "experts"
"""The folder below a router's with the adapters that it routes."""

Examples = Sequence[Mapping[str, Any]]
"""Batches, each the arguments of one `model(**batch)`."""


@dataclass(frozen=True)
class RouterContext:
    """One router's place.

    Attributes:
        name: the router's name on the model.
        model: the model.
        state: the model's state.
        members: the adapters that it routes, in order.
    """

    name: str
    model: nn.Module
    state: ModelState
    members: tuple[str, ...]

    def layers(self) -> Iterator[Adapted]:
        """The layers that any member changes, in the model's order."""
        for module in self.model.modules():
            if isinstance(module, Adapted) and any(module.deltas_of(name) for name in self.members):
                yield module

    def matrices(self) -> Iterator[tuple[Adapted, Site, list[Delta | None]]]:
        """Every matrix that any member changes, with each member's delta there, or None."""
        for layer in self.layers():
            held = [layer.deltas_of(name) for name in self.members]
            for key, site in layer.sites.items():
                if any(key in own for own in held):
                    yield layer, site, [own.get(key) for own in held]

    def check(self) -> None:
        """Raise LorakitError where a member cannot be weighed token by token."""
        for name in self.members:
            adapter = adapters_of(self.state)[name]
            if adapter.router is not None:
                raise LorakitError(
                    f"route: {name!r} has a router of its own ({adapter.method.name}), and routers are not nested; name the "
                    "adapters behind it."
                )
            for path, _ in adapter.replacements():
                raise LorakitError(
                    f"route: adapter {name!r} replaces tensors of {path} (modules_to_save or biases), which have no weight per "
                    "token. Blends and rows can use it: lk.use(model, {...})."
                )
        for layer, site, _ in self.matrices():
            if not site.layout.beside:
                raise LorakitError(
                    f"route: {layer.path} ({site.layout.kind}) multiplies its weights by itself, so that adapters are put in "
                    "their place and no token there can have a weight of its own. Leave it out of the adapters "
                    f"(exclude_modules=[{layer.path.rpartition('.')[2]!r}]), or give whole rows an adapter or a blend: "
                    "lk.use(model, [...])."
                )
            if isinstance(site.layout, Convolution):
                raise LorakitError(
                    f"route: {layer.path} is a {site.layout.kind} layer, which has no tokens to weigh; routers work on linear "
                    "layers and embeddings."
                )

    def decoder(self) -> nn.Module:
        """The model without its head, whose output is the last hidden state."""
        decoder = decoder_of(self.model)
        if decoder is None or getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise LorakitError(
                f"route: this router reads the last hidden state of a transformers decoder, and {type(self.model).__name__} "
                "has none that stands apart from its head. Arrow and LoRAHub route any model."
            )
        inside = {id(module) for module in decoder.modules()}
        outside = [layer.path for layer in self.layers() if id(layer) not in inside]
        if outside:
            raise LorakitError(
                f"route: {outside[0]} stands outside the decoder whose hidden states this router reads; leave it out of the "
                "adapters (exclude_modules)."
            )
        return decoder


def decoder_of(model: nn.Module) -> nn.Module | None:
    """A transformers model without its head; None where there is no such part."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    if decoder is None or decoder is model:
        decoder = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    return decoder if isinstance(decoder, nn.Module) else None


@dataclass(frozen=True, kw_only=True)
class RouterSpec(Method):
    """The options of a router over adapters."""

    made: ClassVar[type[OverAdapters]]
    """What `router` makes; the router's class says whose it is: `class ArrowRouter(OverAdapters, of=Arrow)`."""

    def build(self, shape: Shape, pool: Pool) -> Delta:
        raise LorakitError(
            f"attach: {self.name} is a router over adapters that are on the model already and changes no layer itself; "
            f"lk.route(model, lk.{type(self).__name__}(...), ['a', 'b']) makes one."
        )

    def router(self, context: RouterContext) -> OverAdapters:
        """A new router on this context."""
        return self.made(self, context)


class OverAdapters(Router):
    """A router over the adapters of a context; `places` numbers the matrices that they change, by layer and site."""

    def __init_subclass__(cls, of: type[RouterSpec] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if of is not None:
            of.made = cls

    def __init__(self, spec: RouterSpec, context: RouterContext) -> None:
        super().__init__(context.members)
        top_k = getattr(spec, "top_k", None)
        if top_k is not None and top_k > len(self.members):
            raise LorakitError(
                f"route: {spec.name} was given top_k={top_k} for {len(self.members)} adapters; give at most as many, or None."
            )
        self.places = {(layer.path, site.name): number for number, (layer, site, _) in enumerate(context.matrices())}
        self._state = (context.state,)

    @property
    def state(self) -> ModelState:
        return self._state[0]

    def fit(self, context: RouterContext, examples: Any) -> None:
        """Measure what the router needs on examples; LorakitError where it takes none."""
        if examples is not None:
            raise LorakitError("route: batches were given, and this router measures nothing on them; leave them out.")

    def watch(self, context: RouterContext) -> list[RemovableHandle]:
        """Hooks that the router needs around calls of the model; they are taken off with it."""
        return []


def on_tokens(weights: Tensor, leading: torch.Size, where: str) -> Tensor:
    """Weights (batch, tokens, experts) on the axes of one layer's tokens: the same, or flattened by the model."""
    if weights.shape[:-1] == leading:
        return weights
    if weights.shape[:-1].numel() == leading.numel():
        return weights.reshape(*leading, weights.shape[-1])
    raise LorakitError(
        f"use: the router has weights for tokens {tuple(weights.shape[:-1])}, and {where} was called with "
        f"{tuple(leading)}; it reorders or drops tokens, so a weight per token cannot follow."
    )
