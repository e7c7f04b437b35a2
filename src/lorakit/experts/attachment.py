"""`route`: put a router over adapters that are on a model. It is an adapter like any other: used, saved, trained, taken off.

The experts stay where they are and are not changed; what the router adds is one weight per expert and token (`experts/`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorakit.adapter.adapter import Adapter, adapters_of
from lorakit.adapter.attachment import detach
from lorakit.adapter.construction import check_name
from lorakit.adapter.pretrained import share
from lorakit.adapter.targets import Targets
from lorakit.core.delta import Pool
from lorakit.core.state import state_of
from lorakit.core.using import activate
from lorakit.errors import LorakitError, unknown
from lorakit.experts import RouterSpec
from lorakit.experts.context import OverAdapters, RouterContext


def route(
    model: nn.Module,
    spec: RouterSpec,
    adapters: Iterable[str],
    *,
    name: str | None = None,
    batches: Any = None,
) -> Adapter:
    """Put a router over adapters of a model, and make it active. Its own parameters, if it has any, are trainable.

    Args:
        model: a model with the adapters.
        spec: the router, such as `Arrow(top_k=2)`.
        adapters: names of the adapters, in the order of the router's weights; they become frozen.
        name: the router's name on this model; that of the spec by default.
        batches: for routers that measure: examples, each the arguments of one `model(**batch)` (LoRAHub), or
            {adapter: examples} (retrieval).

    Raises:
        LorakitError: an adapter is not there or cannot be weighed by token, batches are missing; the model is as before.
    """
    adapter = build_router(model, spec, adapters, name or str(getattr(spec, "name", "router")))
    try:
        over(adapter).fit(context_of(adapter), batches)
    except BaseException:
        detach(model, adapter.name)
        raise
    for member in over(adapter).members:
        adapters_of(state_of(model))[member].requires_grad_(False)
    adapter.requires_grad_(True)
    activate(model, adapter.name)
    return adapter


def build_router(model: nn.Module, spec: RouterSpec, adapters: Iterable[str], name: str) -> Adapter:
    """A router as an adapter without layers, on the model, measured on nothing yet and not active."""
    if not isinstance(spec, RouterSpec):
        raise LorakitError(f"route: {spec!r} is no router's spec; one is lk.Arrow(top_k=2).")
    state = state_of(model)
    members = tuple(adapters)
    for member in members:
        if member not in adapters_of(state):
            raise unknown("adapter", str(member), adapters_of(state))
    if len(members) < 1 or len(set(members)) != len(members):
        raise LorakitError(f"route: a router needs different adapters; it was given {list(members)!r}.")
    check_name(name, state, "route")
    context = RouterContext(name, model, state, members)
    context.check()
    router = spec.router(context)
    reference = next(model.parameters(), torch.zeros(()))
    router.to(reference.device)
    adapter = Adapter(name, model, spec, Targets(target_modules=()), Pool(), router=router)
    adapter.handles = router.watch(context)
    adapters_of(state)[name] = adapter
    state.routers[name] = router
    share(adapter)
    adapter.requires_grad_(False)
    return adapter


def over(adapter: Adapter) -> OverAdapters:
    """The router of an adapter that routes others."""
    if not isinstance(adapter.router, OverAdapters):
        raise LorakitError(f"adapter {adapter.name!r} ({adapter.method.name}) is no router over other adapters.")
    return adapter.router


def context_of(adapter: Adapter) -> RouterContext:
    """Where a router stands."""
    return RouterContext(adapter.name, adapter.model, state_of(adapter.model), over(adapter).members)
