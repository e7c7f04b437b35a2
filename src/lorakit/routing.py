"""Who gets which adapter: one, a weighted blend, one per row of the batch, weights per token, none.

One `Board` per model holds the present routing; every adapted layer reads it. Switching is setting one attribute, so
it costs the same for one layer and for a thousand, and no layer's state changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    table: Tensor | None = None
    axis: int = 0
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


class Board:
    """What the adapted layers of one model share: the adapters on it and the present routing."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.routing: Routing = BASE
        self.merged: frozenset[str] = frozenset()
        self.frozen: dict[str, bool] = {}
        """requires_grad of the base's parameters before the first adapter came, to be given back by detach."""

    def set(self, route: Route | Routing) -> Routing:
        """Make `route` the present one; returns the one before."""
        routing = parse(route, self.adapters)
        merged = sorted(self.merged.intersection(routing.names))
        if merged:
            raise LorakitError(
                f"use: adapter {merged[0]!r} is merged into the weights just now, so it acts already; leave `merged` first."
            )
        before, self.routing = self.routing, routing
        return before
