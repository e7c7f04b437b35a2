"""Who gets which adapter: one, a weighted blend, one per row of the batch, weights per token, none.

What users write (`Route`) becomes a `Routing` over a whole batch; a `Router` finds the weights of its members by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call
from lorakit.errors import LorakitError, unknown

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

    @property
    def asks_for_base(self) -> bool:
        """Whether it, or any of its rows, is the model without an adapter."""
        return not self.names or (self.table is not None and not bool(self.table.abs().sum(1).all()))

    def table_on(self, device: torch.device) -> Tensor:
        """The table (rows, names) on a device, in float64 where the device has it."""
        if device not in self._moved:
            assert self.table is not None
            precise = torch.float32 if device.type == "mps" else torch.float64
            self._moved[device] = self.table.to(device=device, dtype=precise)
        return self._moved[device]

    def repeated(self, copies: int) -> Routing:
        """The same for a batch in which each row comes so many times in a row (beam search)."""
        if copies == 1 or self.table is None:
            return self
        return Routing(self.names, None, self.table.repeat_interleave(copies, dim=0), self.axis, self.found)


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
