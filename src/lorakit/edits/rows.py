"""Which edit each row of a batch has, what of an edit each row gets, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core.routing import Routing
from lorakit.core.rows import check_rows, per_row


@dataclass(frozen=True)
class RowChoice:
    """Which prompt (or prefix) each row has: one name for all rows, or an index into `names` per row, -1 for none."""

    names: tuple[str, ...]
    index: Tensor | None = None

    def numbers(self, values: Mapping[str, int], device: torch.device) -> int | Tensor:
        """A number of each one's as one number, or one per row, (rows,); 0 where a row has none."""
        if not self.names:
            return 0
        if self.index is None:
            return values[self.names[0]]
        table = torch.tensor([*(values[name] for name in self.names), 0], device=device)
        return table[self.index.to(device)]


def choose(routing: Routing, among: Mapping[str, Any]) -> RowChoice:
    """Which rows have which of these edits that act whole or not at all (`EditMethod.blends` is False)."""
    names = tuple(name for name in routing.names if name in among)
    if routing.weights is not None:
        given = dict(zip(routing.names, routing.weights, strict=True))
        return RowChoice(tuple(name for name in names if given[name] != 0.0)[:1])
    if not names or routing.table is None:
        return RowChoice(())
    columns = routing.table[:, [routing.names.index(name) for name in names]]
    return RowChoice(names, torch.where(columns.any(dim=1), columns.argmax(dim=1), -1))


def weigh(routing: Routing, name: str, added: Tensor, path: str) -> Tensor:
    """What an edit that blends adds to a layer's output, times the weights that the routing gives it."""
    column = routing.names.index(name)
    if routing.weights is not None:
        weight = routing.weights[column]
        return added if weight == 1.0 else added * weight
    check_rows(added, routing.rows, routing.axis, path)
    return added * per_row(routing.table_on(added.device)[:, column], added, routing.axis).to(added.dtype)


def active(routing: Routing, among: Mapping[str, Any]) -> list[str]:
    """The edits of these that the routing names, but for those whose weight is zero in the whole batch."""
    weights = routing.weights or (1.0,) * len(routing.names)
    return [name for name, weight in zip(routing.names, weights, strict=True) if name in among and weight != 0.0]


def add_columns(mask: Tensor, width: int, real: Tensor | None) -> Tensor:
    """A mask (rows, 1, queries, keys), of bool or added to scores, with `width` further keys to the left: seen by all, but in
    rows where `real` (rows, width) says that nothing stands there."""
    rows = mask.shape[0] if real is None else real.shape[0]
    mask = mask.expand(rows, *mask.shape[1:])
    added = mask.new_full((*mask.shape[:-1], width), 0 if mask.is_floating_point() else 1)
    if real is not None:
        added = added.masked_fill(~real[:, None, None, :], closed(mask))
    return torch.cat([added, mask], dim=-1)


def closed(mask: Tensor) -> float:
    """What stands in a mask where a key is not seen."""
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
