"""One forward of the engine as the layers see it: a flat row of tokens, which of them belong together, and whose they are.

All that attention and the adapters need to know is in this one object, worked out once per step and not once per layer. The
model itself sees a batch of one row with positions, as it does in packed training.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.serve.model.around import Edited, Edits
from lorakit.serve.model.packed import PackedAdapter

TILE = 4
"""Tokens of one row whose attention is computed together; `native.cpp` is written for this number."""

LONG = 192
"""From this many tokens of one request on, its adapters go through matmuls, the faster execution then."""

TOKENS = 16
"""Tokens that read an adapter together in `native/triton/adapters.py`, which is written for this number."""

TOGETHER = 8
"""Tokens that read an adapter together in `linear.cpp`, which is written for this number."""


@dataclass(frozen=True)
class Run:
    """Tokens of one request within a step.

    Attributes:
        tokens: ids, in order.
        start: the position of the first.
        pages: the request's pages, enough for all of them.
        blend: the adapters and their weights; empty is the base.
        wanted: how many logits are wanted, counted from the end: 1 for the last token's, 0 in the middle of a prompt.
        chosen: adapter -> the positions at which its changes act, where these are not all.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    blend: Sequence[tuple[PackedAdapter, float]] = ()
    wanted: int = 1
    chosen: Mapping[PackedAdapter, frozenset[int]] = field(default_factory=dict)


@dataclass
class OnGPU:
    """What the Triton kernels read of a step, on the GPU: int32 tensors as in `Batch` and `Mixture`, brought over in one copy.

    Attributes:
        order, begins: see `Batch.tiles_of_tokens`; empty without adapters, as `starts` is.
        parts, weights: of the mixture.
    """

    table: Tensor
    row: Tensor
    place: Tensor
    tiles: Tensor
    order: Tensor
    begins: Tensor
    starts: Tensor
    parts: Tensor | None = None
    weights: Tensor | None = None

    @staticmethod
    def sizes(runs: int, width: int, mixed: bool) -> list[int]:
        """Numbers of each tensor for so many runs of one token, and pages of each; with adapters or without."""
        return [runs * width, runs, runs, 2 * runs, *((runs, runs + 1, runs + 1) if mixed else (0, 0, 0))]

    @classmethod
    def of(cls, numbers: Tensor, runs: int, tokens: int, width: int, mixed: bool) -> OnGPU:
        """From all of them in one row, for runs of one token."""
        table, row, place, tiles, *rest = numbers.split(cls.sizes(runs, width, mixed))
        return cls(table.view(runs, width), row, place, tiles.view(-1, 2), *rest)


@dataclass
class Mixture:
    """The adapters of a step, one entry for each run and adapter.

    Attributes:
        entries: (run, adapter, weight), runs ascending.
        parts: (layers, entries, 5): what each adapter says about each layer, as addresses; see `PackedAdapter.parts`.
        starts: (runs + 1,): where each run's entries begin.
        weights: (entries,).
        kinds: (runs,): the same number for runs with the same adapters and weights, -1 for the base alone.
        touched: layer -> whether any of the adapters changes it.
        slots, rank: the most adapters of a run, and the largest rank of any.
        edited: whether any of the adapters has edits.
    """

    entries: list[tuple[int, PackedAdapter, float]]
    parts: Tensor
    starts: Tensor
    weights: Tensor
    kinds: np.ndarray[Any, np.dtype[np.int64]]
    touched: list[bool]
    edited: bool = False
    slots: int = 1
    rank: int = 1
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`parts` and `weights` on a device, copied once."""
        if device not in self._moved:
            self._moved[device] = self.parts.to(device), self.weights.to(device)
        return self._moved[device]


@dataclass
class Batch:
    """A step.

    Attributes:
        ids, positions: (1, tokens), for the model.
        row, place: (tokens,) int32: the run of each token, and its position.
        table: (runs, most pages) int32: the pages of each run.
        tiles: (tiles, 2) int32: first token and length of each piece of at most `TILE` tokens of one run.
        spans: first token and length of every run.
        last: tokens whose logits are wanted; `wanted` the same on the host.
        pages: page numbers of each run, for the torch execution.
        mixture: the adapters, or None where no run has any.
        kernels: whether attention and adapters go through Triton's kernels.
        edits: what acts around the model's calls, or None where nothing does.
    """

    ids: Tensor
    positions: Tensor
    row: Tensor
    place: Tensor
    table: Tensor
    tiles: Tensor
    spans: list[tuple[int, int]]
    last: Tensor
    pages: list[Sequence[int]]
    wanted: list[int]
    mixture: Mixture | None = None
    edits: Edits | None = None
    kernels: bool = False

    @functools.cached_property
    def tiles_of_tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens of the same adapters together, as the Triton kernels take them: see `native/triton/adapters.py`."""
        return self._tiles(self.row, TOKENS)

    @functools.cached_property
    def on_gpu(self) -> OnGPU:
        """What the Triton kernels read of this step."""
        device, none = self.ids.device, torch.empty(0, dtype=torch.int32)
        order, begins = (none, none) if self.mixture is None else self.tiles_of_tokens
        parts = [self.table, self.row, self.place, self.tiles, order, begins]
        parts.append(none if self.mixture is None else self.mixture.starts)
        whole = torch.cat([part.flatten() for part in parts])
        whole = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
        pieces = whole.split([part.numel() for part in parts])
        moved = (None, None) if self.mixture is None else self.mixture.to(device)
        return OnGPU(*(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)), *moved)

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """A step's arguments of the attention in `native.cpp`, the same for every layer."""
        table, tiles = self.table, self.tiles
        return (
            *(table.data_ptr(), table.shape[1], self.row.data_ptr(), self.place.data_ptr(), self.row.shape[0]),
            *(tiles.data_ptr(), tiles.shape[0]),
        )

    @functools.cached_property
    def adapters(self) -> tuple[int, ...]:
        """A step's arguments of the products in `linear.cpp`, the same for every layer."""
        return self._adapters(False)

    @functools.cached_property
    def short_adapters(self) -> tuple[int, ...]:
        """`adapters` without the tokens of long runs."""
        return self._adapters(True) if self.long else self.adapters

    def _adapters(self, short: bool) -> tuple[int, ...]:
        if (mixture := self.mixture) is None:
            return (0,) * 8
        order, begins = self.short_tiles if short else self.tiles_of_adapters
        return (
            *(mixture.parts.data_ptr(), mixture.parts.shape[1], self.row.data_ptr(), mixture.starts.data_ptr()),
            *(mixture.weights.data_ptr(), order.data_ptr(), begins.data_ptr(), begins.shape[0] - 1),
        )

    @functools.cached_property
    def structures(self) -> tuple[Any, Any]:
        """`addresses` and `adapters` as `stack.cpp` takes them."""
        return tuple((ctypes.c_int64 * len(own))(*own) for own in (self.addresses, self.adapters))  # type: ignore[return-value]

    @functools.cached_property
    def long(self) -> list[int]:
        """Runs whose adapters go through matmuls."""
        return [run for run, (_, count) in enumerate(self.spans) if count >= LONG]

    @functools.cached_property
    def short(self) -> Tensor:
        """`row`, with -1 for the tokens of long runs."""
        short = self.row.clone()
        for run in self.long:
            first, count = self.spans[run]
            short[first : first + count] = -1
        return short

    @functools.cached_property
    def tiles_of_adapters(self) -> tuple[Tensor, Tensor]:
        """Tokens of the same adapters together: the tokens with any, sorted by them, and where in that order each tile of at
        most `TOGETHER` begins, and the last ends; both int32."""
        return self._tiles(self.row, TOGETHER)

    @functools.cached_property
    def short_tiles(self) -> tuple[Tensor, Tensor]:
        """`tiles_of_adapters` without the tokens of long runs."""
        return self._tiles(self.short, TOGETHER)

    def _tiles(self, row: Tensor, most: int) -> tuple[Tensor, Tensor]:
        assert self.mixture is not None
        own = row.numpy()
        kinds = np.where(own < 0, -1, self.mixture.kinds[own])
        order = np.argsort(kinds, kind="stable").astype(np.int32)
        order = order[np.searchsorted(kinds[order], 0) :]
        own = kinds[order]
        place = np.arange(len(own)) - np.searchsorted(own, own)
        begins = np.append(np.flatnonzero(place % most == 0), len(own)).astype(np.int32)
        return torch.from_numpy(order), torch.from_numpy(begins)

    @functools.cached_property
    def head(self) -> Batch:
        """The same step as the output layer sees it: only the tokens whose logits are wanted."""
        row = self.row[self.wanted]
        counts = torch.bincount(row.long(), minlength=len(self.spans)).tolist()
        firsts = [0, *np.cumsum(counts).tolist()]
        spans = list(zip(firsts, counts, strict=False))
        return dataclasses.replace(self, row=row, spans=spans)


def mix(blends: Sequence[Sequence[tuple[PackedAdapter, float]]]) -> Mixture | None:
    """The adapters of a step from each run's."""
    entries = [(run, adapter, weight) for run, blend in enumerate(blends) for adapter, weight in blend]
    if not entries:
        return None
    counts = np.cumsum([0, *(len(blend) for blend in blends)], dtype=np.int32)
    parts = torch.stack([adapter.parts for _, adapter, _ in entries], 1)
    known: dict[tuple[tuple[int, float], ...], int] = {(): -1}
    keys = [tuple((id(adapter), weight) for adapter, weight in blend) for blend in blends]
    return Mixture(
        entries=entries,
        parts=parts,
        starts=torch.from_numpy(counts),
        weights=torch.tensor([weight for _, _, weight in entries]),
        kinds=np.array([known.setdefault(key, len(known) - 1) for key in keys]),
        touched=parts.ne(0).any(-1).any(-1).tolist(),
        slots=max(map(len, blends)),
        rank=max(1, *(adapter.rank for _, adapter, _ in entries)),
        edited=any(adapter.around is not None for _, adapter, _ in entries),
    )


def assemble(runs: Sequence[Run], device: torch.device, mixture: Mixture | None) -> Batch:
    """A batch from the runs of a step; `mixture` is `mix` of their blends, which steps with the same runs share."""
    counts = [len(run.tokens) for run in runs]
    total = sum(counts)
    ids = np.empty(total, dtype=np.int64)
    place = np.empty(total, dtype=np.int32)
    row = np.repeat(np.arange(len(runs), dtype=np.int32), counts)
    table = np.zeros((len(runs), max(len(run.pages) for run in runs)), dtype=np.int32)
    spans: list[tuple[int, int]] = []
    tiles: list[tuple[int, int]] = []
    last: list[int] = []
    first = 0
    for index, (run, count) in enumerate(zip(runs, counts, strict=True)):
        ids[first : first + count] = run.tokens
        place[first : first + count] = np.arange(run.start, run.start + count)
        table[index, : len(run.pages)] = run.pages
        spans.append((first, count))
        if count == 1:
            tiles.append((first, 1))
        else:
            tiles += [(first + t, min(TILE, count - t)) for t in range(0, count, TILE)]
        last += range(first + count - run.wanted, first + count)
        first += count
    edits: Edits | None = None
    if mixture is not None and mixture.edited:
        ids = ids.clip(0)  # what stands before a text has no id
        edits = Edits(
            [
                Edited(*spans[run], runs[run].start, adapter.around, weight, runs[run].chosen.get(adapter))
                for run, adapter, weight in mixture.entries
                if adapter.around is not None
            ]
        )
    places = torch.from_numpy(place)
    return Batch(
        ids=torch.from_numpy(ids)[None].to(device),
        positions=places.long()[None].to(device),
        row=torch.from_numpy(row),
        place=places,
        table=torch.from_numpy(table),
        tiles=torch.tensor(tiles, dtype=torch.int32),
        spans=spans,
        last=torch.tensor(last, dtype=torch.long, device=device),
        pages=[run.pages for run in runs],
        wanted=last,
        mixture=mixture,
        edits=edits,
    )
