"""The rows of a batch: which edit each has and how much of it, and the columns that prompts and prefixes add to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorakit.core.routing import Routing
from lorakit.core.rows import check_rows, per_row
from lorakit.errors import LorakitError


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

    def columns(self, sizes: Mapping[str, int], device: torch.device, causal: bool) -> Columns:
        """The columns that those of these lengths add to the batch."""
        lengths = self.numbers(sizes, device)
        return Columns(max(sizes.values(), default=0), lengths if isinstance(lengths, Tensor) else None, causal)


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


@dataclass(frozen=True)
class Columns:
    """The columns that prompts or prefixes of different lengths add to a batch, and which of them each row sees.

    Attributes:
        width: columns, those of the longest prompt.
        lengths: (rows,), the length of each row's prompt, where rows differ; None where all have `width`.
        causal: a cache may follow, so that unused columns stand before the prompt and each row's text begins at `width`.
    """

    width: int
    lengths: Tensor | None
    causal: bool

    @property
    def trailing(self) -> bool:
        """Whether unused columns stand behind the text, and each row's text right behind its own prompt."""
        return self.lengths is not None and self.width > 0 and not self.causal

    @property
    def real(self) -> Tensor | None:
        """(rows, width): which of the columns are a prompt's; None where all are."""
        if self.lengths is None or not self.width:
            return None
        step = torch.arange(self.width, device=self.lengths.device)
        return step >= self.width - self.lengths[:, None] if self.causal else step < self.lengths[:, None]

    def positions(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(width,) or (rows, width): the place of each column in its row's prompt, from 0."""
        step = torch.arange(self.width, device=device, dtype=dtype)
        if self.lengths is None or self.trailing:
            return step
        return (step - (self.width - self.lengths[:, None])).clamp_min(0)

    def join(self, added: Tensor, own: Tensor) -> Tensor:
        """Added columns (rows, width, …) and own ones, each in its place."""
        whole = torch.cat([added, own], dim=1)
        if not self.trailing:
            return whole
        before = cast(Tensor, self.lengths)[:, None]
        step = torch.arange(whole.shape[1], device=own.device)
        # column t is the prompt's t, then own t - p, then what is left over of the prompt's filling
        index = torch.where(step < before, step, self.width + step - before)
        index = torch.where(index >= whole.shape[1], before + index - whole.shape[1], index)
        return whole.gather(1, index.reshape(*index.shape, *[1] * (own.ndim - 2)).expand_as(whole))

    def per_row(self, tables: list[Tensor], index: Tensor | None, rows: int, axis: int = 0) -> Tensor:
        """Each row's own of these tables, (rows, …) with `width` entries along the tables' `axis`: zero in unused ones."""
        if index is None:
            return tables[0].expand(rows, *tables[0].shape)
        padded = []
        for table in tables:
            shape = list(table.shape)
            shape[axis] = self.width - shape[axis]
            empty = table.new_zeros(shape)
            padded.append(torch.cat([empty, table] if self.causal else [table, empty], dim=axis))
        padded.append(torch.zeros_like(padded[0]))
        return torch.stack(padded)[index.to(padded[0].device)]

    def grow_mask(self, mask: Tensor | None, like: Tensor, own: int, enters: bool = True) -> Tensor | None:
        """A mask over `own` keys with these columns; `like` (rows, …) has its rows, `enters` says that the columns are
        queries too. None where all is seen."""
        if mask is None:
            if self.real is None:
                return None
            mask = torch.ones(like.shape[0], own, dtype=torch.long, device=like.device)
        if mask.ndim == 2:
            added = mask.new_ones(mask.shape[0], self.width) if self.real is None else self.real.to(mask.dtype)
            return self.join(added, mask)
        if mask.ndim != 4 or self.trailing:
            raise LorakitError(
                f"an attention mask of shape {tuple(mask.shape)} cannot be extended by a prompt; give one of (rows, tokens)."
            )
        real = self.real
        mask = mask if real is None else mask.expand(real.shape[0], *mask.shape[1:])
        added = mask.new_full((*mask.shape[:-1], self.width), 0 if mask.is_floating_point() else 1)
        if real is not None:
            added = added.masked_fill(~real[:, None, None, :], closed(mask))
        mask = torch.cat([added, mask], dim=-1)
        return self._grow_queries(mask) if enters else mask

    def _grow_queries(self, mask: Tensor) -> Tensor:
        """A mask (rows, 1, queries, keys) whose keys have these columns, with the columns' own queries above."""
        opened = 0 if mask.is_floating_point() else 1
        rows = mask.new_full((*mask.shape[:-2], self.width, mask.shape[-1]), closed(mask))
        order = torch.ones(self.width, self.width, dtype=torch.bool, device=mask.device)
        order = order.tril() if self.causal else order
        if self.real is not None:
            order = (order & self.real[:, None, None, :]) | torch.eye(self.width, dtype=torch.bool, device=mask.device)
        rows[..., : self.width] = torch.where(order, opened, closed(mask)).to(mask.dtype)
        return torch.cat([rows, mask], dim=-2)


def closed(mask: Tensor) -> float:
    """What stands in a mask where a key is not seen."""
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
