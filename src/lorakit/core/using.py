"""Who acts, for the length of a block or until further notice, and what is recorded of calls meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lorakit.core.hooks import CallHooks, hooked
from lorakit.core.routing import Route, Routing, parse
from lorakit.core.rows import first_tensor
from lorakit.core.state import ModelState, found_state, state_of
from lorakit.errors import LorakitError


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

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if first_tensor(args, kwargs).shape[0] != routing.rows:
            return None
        before, state.routing = state.routing, routing
        return args, kwargs, before

    def leave(before: Routing, output: Any) -> None:
        state.routing = before

    with hooked(
        CallHooks(enter, leave).on(encoder, first=True)
    ):  # before the hooks of edits, which ask for the route too
        yield


# -- what is recorded ------------------------------------------------------------------------------------------------------


@contextmanager
def _noting(state: ModelState, **values: Any) -> Iterator[None]:
    """Within the block these attributes of the state's notes have these values; afterwards what they had before."""
    before = {name: getattr(state.notes, name) for name in values}
    vars(state.notes).update(values)
    try:
        yield
    finally:
        vars(state.notes).update(before)


@contextmanager
def noted(model: nn.Module) -> Iterator[list[Callable[[], Tensor]]]:
    """Within the block, what adapters add to a training loss (the balance of a mixture) is noted in the list:

    with noted(model) as extra:
        loss = model(**batch).loss
    loss = loss + sum(own() for own in extra)

    Each entry gives a scalar with its gradient when it is called. LorakitError where the model has no adapter.
    """
    losses: list[Callable[[], Tensor]] = []
    with _noting(state_of(model), losses=losses):
        yield losses


@contextmanager
def counted(model: nn.Module, counts: Tensor) -> Iterator[None]:
    """Within the block, each token of a batch counts so many times in what adapters add to a training loss; padding 0 times.

    `counts` has the axes of the model's tokens. It is not needed for models that are given a padding mask.
    """
    state = found_state(model)
    with contextlib.nullcontext() if state is None else _noting(state, counts=counts):
        yield


@contextmanager
def routes(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Within the block, what routers decide is noted in the list: the layer or feed-forward, and its weights (…, experts)."""
    weights: list[tuple[str, Tensor]] = []
    with _noting(state_of(model), weights=weights):
        yield weights


def whole_rows(model: nn.Module) -> str | None:
    """The router in use that weighs whole rows, so that rows must run as they are: not packed, nothing of them shared."""
    state = found_state(model)
    if state is None:
        return None
    return next((name for name, own in state.routers.items() if own.whole_rows and name in state.routing.names), None)
