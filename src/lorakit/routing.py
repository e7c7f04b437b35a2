"""Who gets which adapter: one, a weighted blend, one per row of the batch, weights per token, none.

One `Board` per model holds the present routing; every adapted layer reads it. Switching is setting one attribute, so
it costs the same for one layer and for a thousand, and no layer's state changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lorakit.delta import Call
from lorakit.errors import LorakitError, unknown

if TYPE_CHECKING:
    from lorakit.adapter import Adapter

Blend = Mapping[str, float]
Route = str | Blend | Sequence["str | Blend | None"] | None
"""What users write: "sql", {"sql": .7, "law": .3}, ["sql", None, {"law": .5}], None."""


@dataclass(frozen=True)
class Routing:
    """A parsed route over a whole batch: the names used, and their weights.

    Attributes:
        names: the adapters that take part, in a fixed order.
        weights: one number per name, for the whole batch; or None, and then
        table: (rows, names), the weights of each row, or of each token with `axis` 1 (a flat batch of one row).
        found: for the length of one call of a block or of the model: router -> the weights that it has found for the tokens
            of this call, where that is done once for many layers.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    table: Tensor | None = None
    axis: int = 0
    found: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """The number of rows that the routing names."""
        return 0 if self.table is None else self.table.shape[0]

    def table_on(self, device: torch.device) -> Tensor:
        """The table (rows, names) on a device, in float64 where the device has it."""
        if device not in self._moved:
            assert self.table is not None
            precise = torch.float32 if device.type == "mps" else torch.float64
            self._moved[device] = self.table.to(device=device, dtype=precise)
        return self._moved[device]


BASE = Routing((), ())


def _blend(route: str | Blend | None, known: Iterable[str]) -> dict[str, float]:
    known = list(known)
    blend = {} if route is None else {route: 1.0} if isinstance(route, str) else dict(route)
    for name, weight in blend.items():
        if name not in known:
            raise unknown("adapter", str(name), known)
        if not isinstance(weight, int | float) or weight != weight:
            raise LorakitError(f"use: adapter {name!r} was given the weight {weight!r}; a weight is a number.")
    return blend


def parse(route: Route | Routing, known: Iterable[str]) -> Routing:
    """A route as users write it, as a Routing.

    Args:
        route: a name, a blend {name: weight}, a sequence with one of these or None per batch row, or None.
        known: the adapters on the model.
    """
    known = list(known)
    if isinstance(route, Routing):
        for name in route.names:
            if name not in known:
                raise unknown("adapter", name, known)
        return route
    if route is None or isinstance(route, str | Mapping):
        blend = _blend(route, known)
        return Routing(tuple(blend), tuple(float(weight) for weight in blend.values()))
    if not isinstance(route, Sequence):
        raise LorakitError(
            f"use: a route was given as {type(route).__name__}; it is a name, a blend like {{'sql': 0.7, 'law': 0.3}}, a "
            "list with one of these or None per row of the batch, or None for the base model."
        )
    if not route:
        raise LorakitError("use: an empty list routes no row; give one entry per row of the batch, or None.")
    rows = [_blend(entry, known) for entry in route]
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    table = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows], dtype=torch.float64)
    table = table.reshape(len(rows), len(names))
    return Routing(names, None, table)


class Router(nn.Module, ABC):
    """Gives every token a weight for each of some adapters on the model, its members. It is used like an adapter, by its
    name, and may stand in a blend or in a row of its own.

    Attributes:
        members: the adapters, in the order of the weights.
        whole_rows: the weights are about whole rows of a batch, so that rows must not be packed into one.
    """

    whole_rows = False

    def __init__(self, members: Sequence[str]) -> None:
        super().__init__()
        self.members = tuple(members)

    @abstractmethod
    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        """The weights for one call of a layer: (…, members), on the axes of `call.down`, in float32 or better.

        Args:
            layer, site: the layer's path and the name of the matrix in it.
            call: the layer's call.
            found: what the router has found for the model's whole call, if it does so (`Routing.found`).
        """


class Board:
    """What the adapted layers of one model share: the adapters on it and the present routing."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.routers: dict[str, Router] = {}
        """The routers among the adapters."""
        self.routing: Routing = BASE
        self.merged: frozenset[str] = frozenset()
        self.extra: list[Callable[[], Tensor]] | None = None
        """Where what adapters add to a training loss is noted just now (`adapter.noted`)."""
        self.seen: list[tuple[str, Tensor]] | None = None
        """Where it is noted just now what routers decide: layer or block, (…, experts) (`adapter.routes`)."""
        self.counts: Tensor | None = None
        """How often each token of the present batch counts in that (`adapter.counted`)."""
        self.frozen: dict[str, bool] = {}
        """requires_grad of the base's parameters before the first adapter came, to be given back by detach."""
        self.seams: Any = None
        """Where edits stand around the model's calls (`seam.Seams`), once there are any."""
        self.prompts: Tensor | None = None
        """(rows,): how many tokens of each row are the prompt, while somebody says so (`adapter.prompts`)."""

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
