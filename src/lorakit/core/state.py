"""What the adapted layers of one model share: the adapters on it, the routers, and who acts just now.

One `ModelState` per model; every adapted layer reads it. Switching adapters is setting one attribute of it, so it costs the
same for one layer and for a thousand, and no layer's state changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.core.routing import BASE, Route, Router, Routing, parse
from lorakit.core.storage import settle
from lorakit.errors import LorakitError

log = logging.getLogger("lorakit")


class OnModel(Protocol):
    """What the state needs of an adapter: its spec, and the layers that it changes."""

    @property
    def method(self) -> Any: ...

    @property
    def layers(self) -> Mapping[str, nn.Module]: ...


class EditsOnModel(Protocol):
    """What the state needs of the edits on a model (`edits.hooks.EditHooks`)."""

    def check(self, routing: Routing) -> None:
        """Raise LorakitError for a routing that the edits cannot follow."""

    def rehook(self) -> None:
        """Put every hook where its path leads now."""

    def remove(self, names: Iterable[str]) -> None:
        """Take the edits of these adapters off."""


@dataclass
class Notes:
    """What is recorded of calls (`using.noted`, `using.routes`, `using.counted`).

    Attributes:
        losses: what adapters add to a training loss; None while it is not recorded.
        weights: what routers decide, (layer or block, weights (…, experts)); None while it is not recorded.
        counts: how often each token of the present batch counts in `losses`.
    """

    losses: list[Callable[[], Tensor]] | None = None
    weights: list[tuple[str, Tensor]] | None = None
    counts: Tensor | None = None

    def add_weights(self, where: str, weights: Tensor, leading: torch.Size) -> None:
        """Record a router's weights for the tokens `leading` of one call, where weights are recorded."""
        if self.weights is not None:
            self.weights.append((where, weights.detach().expand(*leading, -1)))


class ModelState:
    """What the adapted layers, the edits and the routers of one model read at each call.

    Attributes:
        adapters: by name.
        routers: the routers among them.
        routing: who acts just now.
        decided: whether anybody has said who acts: by `use`, `activate`, or by loading an adapter with `active=False`.
        merged: the adapters that are merged for a while.
        base_alone: whether `state_dict` leaves the adapters' tensors out just now (`adapter.pretrained`).
        edits: the edits' hooks on the model, once there are any.
        notes: what is recorded of calls.
        base_requires_grad: flags of the base's parameters before the first adapter came, given back with the last.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, OnModel] = {}
        self.routers: dict[str, Router] = {}
        self.routing: Routing = BASE
        self.decided = False
        self.merged: frozenset[str] = frozenset()
        self.base_alone = False
        self.edits: EditsOnModel | None = None
        self.notes = Notes()
        self.base_requires_grad: dict[str, bool] = {}

    def set(self, route: Route | Routing) -> Routing:
        """Make `route` the present one; returns the one before. LorakitError where it cannot be followed."""
        routing = parse(route, self.adapters)
        merged = sorted(self.merged.intersection(self.members(routing)))
        if merged:
            raise LorakitError(
                f"use: adapter {merged[0]!r} is merged into the weights just now, so it acts already; leave `merged` first."
            )
        if self.merged and routing.asks_for_base:
            raise LorakitError(
                f"use: adapter {min(self.merged)!r} is merged into the weights just now, so that the model is not its base; "
                "leave `merged` first. What shall not act beside it is switched off before."
            )
        if self.edits is not None:
            self.edits.check(routing)
        before, self.routing = self.routing, routing
        self.decided = True
        return before

    def say_idle(self) -> None:
        """Log once that adapters are here and none of them acts, where nobody has said that it should be so."""
        if not self.decided:
            self.decided = True
            log.warning(
                "%d adapter(s) are on this model and none acts (%s), so it runs as its base; lk.use(model, name) or "
                "lk.activate(model, name) lets one act, lk.activate(model, None) says that none shall.",
                len(self.adapters),
                ", ".join(self.adapters),
            )

    def members(self, routing: Routing) -> tuple[str, ...]:
        """The adapters that take part in a routing, those behind its routers among them."""
        if not self.routers:
            return routing.names
        names: dict[str, None] = {}
        for name in routing.names:
            names.update(dict.fromkeys(self.routers[name].members if name in self.routers else (name,)))
        return tuple(names)


def found_state(model: nn.Module) -> ModelState | None:
    """The state of a model, or None where no adapter is on it."""
    state = getattr(model, "_lorakit", None)
    return state if isinstance(state, ModelState) else None


def state_of(model: nn.Module) -> ModelState:
    """The state of a model with adapters; LorakitError where there is none."""
    state = found_state(model)
    if state is None:
        raise LorakitError(f"this {type(model).__name__} has no adapter; add one with lk.attach or lk.load.")
    return state


def open_state(model: nn.Module) -> ModelState:
    """The state of a model. Where there is none yet, a new one: the base is frozen then, and its storages are settled."""
    state = found_state(model)
    if state is None:
        state = ModelState()
        state.base_requires_grad = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        model._lorakit = state  # type: ignore[assignment]
        model.requires_grad_(False)
        settle(model)
    return state


def close_state(model: nn.Module) -> None:
    """Take the state off, and give the base's `requires_grad` flags back."""
    state = state_of(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(state.base_requires_grad.get(key, parameter.requires_grad))
    del model._lorakit
