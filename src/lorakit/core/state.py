"""What the adapted layers of one model share: the adapters on it, the present routing, and what is said for a while.

One `ModelState` per model; every adapted layer reads it. Switching adapters is setting one attribute of it, so it costs the
same for one layer and for a thousand, and no layer's state changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorakit.core.routing import BASE, Route, Router, Routing, parse
from lorakit.core.rows import first_tensor
from lorakit.core.storage import settle
from lorakit.errors import LorakitError


class OnModel(Protocol):
    """What the state needs of an adapter: its spec, and the layers that it changes."""

    @property
    def method(self) -> Any: ...

    @property
    def layers(self) -> Mapping[str, nn.Module]: ...


class ModelState:
    """What the adapted layers, the edits and the routers of one model read at each call."""

    def __init__(self) -> None:
        self.adapters: dict[str, OnModel] = {}
        self.routers: dict[str, Router] = {}
        """The routers among the adapters."""
        self.routing: Routing = BASE
        self.merged: frozenset[str] = frozenset()
        self.extra: list[Callable[[], Tensor]] | None = None
        """Where what adapters add to a training loss is noted just now (`noted`)."""
        self.seen: list[tuple[str, Tensor]] | None = None
        """Where it is noted just now what routers decide: layer or block, (…, experts) (`routes`)."""
        self.counts: Tensor | None = None
        """How often each token of the present batch counts in that (`counted`)."""
        self.frozen: dict[str, bool] = {}
        """requires_grad of the base's parameters before the first adapter came, to be given back with the last."""
        self.seams: Any = None
        """Where edits stand around the model's calls (`edits.hooks`), once there are any."""
        self.prompts: Tensor | None = None
        """(rows,): how many tokens of each row are the prompt, while somebody says so (`prompts`)."""

    def set(self, route: Route | Routing) -> Routing:
        """Make `route` the present one; returns the one before."""
        routing = parse(route, self.adapters)
        merged = sorted(self.merged.intersection(self.members(routing)))
        if merged:
            raise LorakitError(
                f"use: adapter {merged[0]!r} is merged into the weights just now, so it acts already; leave `merged` first."
            )
        self._check_whole(routing)
        before, self.routing = self.routing, routing
        return before

    def members(self, routing: Routing) -> tuple[str, ...]:
        """The adapters that take part in a routing, those behind its routers among them."""
        if not self.routers:
            return routing.names
        names: dict[str, None] = {}
        for name in routing.names:
            names.update(dict.fromkeys(self.routers[name].members if name in self.routers else (name,)))
        return tuple(names)

    def _check_whole(self, routing: Routing) -> None:
        """Refuse shares of edits that act whole or not at all, and two of a kind for one row."""
        specs = {name: self.adapters[name].method for name in routing.names if name in self.adapters}
        whole = {name: spec for name, spec in specs.items() if not getattr(spec, "blends", True)}
        if not whole:
            return
        if routing.axis:
            raise LorakitError(
                f"use: {next(iter(whole))!r} stands in front of a row, and the route is one for each token."
            )
        table = [routing.weights] if routing.weights is not None else cast(Tensor, routing.table).tolist()
        for row in table:
            taken: dict[str, str] = {}
            for name, weight in zip(routing.names, row, strict=True):
                if name not in whole or weight == 0.0:
                    continue
                spec: Any = whole[name]
                if weight != 1.0:
                    raise LorakitError(
                        f"use: {name!r} was given the weight {weight:g}. A {spec.family} of {spec.name} is read by the model's "
                        "attention as tokens are, and there is no share of a token: it acts whole (1) or not at all (0). Give "
                        "other rows another one by a list; deltas and bottlenecks blend."
                    )
                if spec.family in taken:
                    raise LorakitError(
                        f"use: one row was given two of a kind, {taken[spec.family]!r} and {name!r}, both a {spec.family}; a "
                        "row has one. Deltas and bottlenecks may act beside it."
                    )
                taken[spec.family] = name


def found_state(model: nn.Module) -> ModelState | None:
    """The state of a model, or None where no adapter is on it."""
    state = getattr(model, "_lorakit", None)
    return state if isinstance(state, ModelState) else None


def state_of(model: nn.Module) -> ModelState:
    """The state of a model with adapters; LorakitError where there is none."""
    state = found_state(model)
    if state is None:
        raise LorakitError(f"this {type(model).__name__} has no adapter; lk.attach or lk.load puts one on.")
    return state


def open_state(model: nn.Module) -> ModelState:
    """The state of a model. Where there is none yet, a new one: the base is frozen then, and its storages are settled."""
    state = found_state(model)
    if state is None:
        state = ModelState()
        state.frozen = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        model._lorakit = state  # type: ignore[assignment]
        model.requires_grad_(False)
        settle(model)
    return state


def close_state(model: nn.Module) -> None:
    """Take the state off, and give the base's `requires_grad` flags back."""
    state = state_of(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(state.frozen.get(key, parameter.requires_grad))
    del model._lorakit


# -- who acts --------------------------------------------------------------------------------------------------------------


@contextmanager
def routed(state: ModelState, route: Route | Routing) -> Iterator[None]:
    """Within the block the state's routing is `route`; afterwards what it was, whatever happened."""
    before = state.set(route)
    try:
        yield
    finally:
        state.routing = before


@contextmanager
def use(model: nn.Module, route: Route | Routing, copies: int = 1) -> Iterator[None]:
    """Within the block the model runs with this route; afterwards with what it had before.

    Args:
        model: a model with adapters.
        route: one name; a blend {name: weight}; a list with one of these or None per row of the batch; None for the base.
        copies: how often each row is repeated in the batch (beam search, several returned sequences). The encoder of an
            encoder-decoder reads each row once, before it is repeated.

    Raises:
        LorakitError: a name that is on no adapter of this model, or one that is merged just now.
    """
    state = state_of(model)
    routing = parse(route, state.adapters)
    with routed(state, routing.repeated(copies)), _once_in_encoder(state, model, routing, copies):
        yield


def activate(model: nn.Module, route: Route | Routing, copies: int = 1) -> None:
    """`use` without an end: the route stays until the next.

    Raises:
        LorakitError: as `use`, and for copies of rows in an encoder-decoder, whose encoder needs the end of a block.
    """
    state = state_of(model)
    routing = parse(route, state.adapters)
    if copies > 1 and routing.table is not None and _encoder(model) is not None:
        raise LorakitError(
            f"activate: {type(model).__name__} encodes each row once and decodes {copies} copies of it; use "
            "`with lk.use(model, route, copies=...)` for a route per row."
        )
    state.set(routing.repeated(copies))


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder of transformers; None for any other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return cast(nn.Module, cast(Any, model).get_encoder())


@contextmanager
def _once_in_encoder(state: ModelState, model: nn.Module, routing: Routing, copies: int) -> Iterator[None]:
    """Within the block, an encoder that is called with rows not yet repeated runs with the route of these."""
    encoder = None if copies == 1 or routing.table is None else _encoder(model)
    if encoder is None:
        yield
        return
    outer: list[Routing] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer.append(state.routing)
        if first_tensor(args, kwargs).shape[0] == routing.rows:
            state.routing = routing

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        state.routing = outer.pop()

    # the edits in front of the encoder ask for the route too
    handles = [
        encoder.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        encoder.register_forward_hook(leave, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- what is said for a while ----------------------------------------------------------------------------------------------


@contextmanager
def _said(state: ModelState, **values: Any) -> Iterator[None]:
    """Within the block these attributes of the state have these values; afterwards what they had before."""
    before = {name: getattr(state, name) for name in values}
    vars(state).update(values)
    try:
        yield
    finally:
        vars(state).update(before)


@contextmanager
def prompts(model: nn.Module, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """Within the block each row's first tokens, so many, are its prompt, for edits that act on a prompt alone (ReFT).

    Padding does not count. Without it the prompt of a row is all that comes before anything is in the cache: what `generate`
    is given, or the whole text of a classifier. Training on prompts with their answers has to say where the answers begin.

    Args:
        model: a model with adapters; LorakitError where it has none.
        lengths: (rows,): how many tokens of each row are its prompt.
    """
    with _said(state_of(model), prompts=torch.as_tensor(lengths)):
        yield


@contextmanager
def noted(model: nn.Module) -> Iterator[list[Callable[[], Tensor]]]:
    """Within the block, what adapters add to a training loss (the balance of a mixture) is noted in the list:

    with noted(model) as extra:
        loss = model(**batch).loss
    loss = loss + sum(own() for own in extra)

    Each entry gives a scalar with its gradient when it is called. LorakitError where the model has no adapter.
    """
    notes: list[Callable[[], Tensor]] = []
    with _said(state_of(model), extra=notes):
        yield notes


@contextmanager
def counted(model: nn.Module, counts: Tensor) -> Iterator[None]:
    """Within the block, the tokens of a batch count so often in what adapters add to a training loss; padding 0 times.

    `counts` has the axes of the model's tokens. Models that are given a mask of padding need not be told.
    """
    state = found_state(model)
    with contextlib.nullcontext() if state is None else _said(state, counts=counts):
        yield


@contextmanager
def routes(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Within the block, what routers decide is noted in the list: the layer or feed-forward, and its weights (…, experts)."""
    seen: list[tuple[str, Tensor]] = []
    with _said(state_of(model), seen=seen):
        yield seen


def whole_rows(model: nn.Module) -> str | None:
    """The router in use that weighs whole rows, so that rows must run as they are: not packed, nothing of them shared."""
    state = found_state(model)
    if state is None:
        return None
    return next((name for name, own in state.routers.items() if own.whole_rows and name in state.routing.names), None)
