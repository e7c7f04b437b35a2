"""CUDA graphs for decoding: a step of one token a request is recorded once and replayed, without a call of Python in between.

A graph reads and writes the same memory each time. So it is recorded over tensors of its own, for a number of requests that
is a power of two; a step is copied into these, the rest being requests that write to a page nobody reads. What differs in more
than numbers (how many pages and adapters there is room for, which layers are changed) has a graph of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.native.triton import power
from lorakit.serve.model.batch import Batch, OnGPU
from lorakit.serve.model.cache import Cache

MOST = 128
"""Requests of the largest step that is recorded."""

GRAPHS = 48
"""Graphs that are kept; beyond, steps run as they are."""


class Recorder(Protocol):
    """What records a function and replays it: `CudaRecorder`, or in tests one that calls it again."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What replays `run`, and the tensor that its result then lies in."""
        ...


class CudaRecorder:
    """By `torch.cuda.graph`, all graphs in one pool of memory, since only one runs at a time."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        run()  # kernels are compiled and memory is asked for before it is recorded
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


@dataclasses.dataclass
class _Recorded:
    """A graph, and the tensors that it reads and writes."""

    batch: Batch
    numbers: Tensor
    replay: Callable[[], None]
    logits: Tensor


class Graphs:
    """The graphs of one serving model over one cache."""

    def __init__(self, forward: Callable[[Batch, Cache], Tensor], cache: Cache, recorder: Recorder) -> None:
        self.forward, self.cache, self.recorder = forward, cache, recorder
        (self.scratch,) = cache.take(1)
        self.recorded: dict[tuple[object, ...], _Recorded] = {}

    def run(self, batch: Batch) -> Tensor | None:
        """The logits of a step, or None where it is none of those that are recorded."""
        count = len(batch.spans)
        if count > MOST or batch.row.shape[0] != count or len(batch.wanted) != count:
            return None
        size, width = power(count), power(batch.table.shape[1])
        mixture = batch.mixture
        adapters = () if mixture is None else (power(mixture.slots), power(mixture.rank), *mixture.touched)
        key = (size, width, *adapters)
        if key not in self.recorded:
            if len(self.recorded) == GRAPHS:
                return None
            self.recorded[key] = self._record(batch, size, width)
        own = self.recorded[key]
        self._fill(own.batch, own.numbers, batch)
        own.replay()
        return own.logits[:count]

    def _record(self, batch: Batch, size: int, width: int) -> _Recorded:
        device, mixture = batch.ids.device, batch.mixture
        sizes = OnGPU.sizes(size, width, mixture is not None)
        numbers = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        own = dataclasses.replace(
            batch,
            ids=torch.zeros(1, size, dtype=torch.long, device=device),
            positions=torch.zeros(1, size, dtype=torch.long, device=device),
            row=torch.arange(size, dtype=torch.int32),
            spans=[(one, 1) for one in range(size)],
            wanted=list(range(size)),
            last=torch.arange(size, device=device),
        )
        on = OnGPU.of(numbers, size, size, width, mixture is not None)
        if mixture is not None:
            slots, rank = power(mixture.slots), power(mixture.rank)
            own.mixture = dataclasses.replace(mixture, slots=slots, rank=rank)
            layers = mixture.parts.shape[0]
            on.parts = torch.zeros(layers, size * slots, 5, dtype=torch.int64, device=device)
            on.weights = torch.zeros(size * slots, device=device)
        own.__dict__["on_gpu"] = on
        self._fill(own, numbers, batch)
        replay, logits = self.recorder.record(lambda: self.forward(own, self.cache))
        return _Recorded(own, numbers, replay, logits)

    def _fill(self, own: Batch, numbers: Tensor, batch: Batch) -> None:
        """Copy a step into the tensors of a graph."""
        size, count = own.row.shape[0], batch.row.shape[0]
        own.ids[:, :count].copy_(batch.ids, non_blocking=True)
        own.positions[:, :count].copy_(batch.positions, non_blocking=True)
        table = torch.full((size, own.on_gpu.table.shape[1]), self.scratch, dtype=torch.int32)
        table[:count, : batch.table.shape[1]] = batch.table
        place = torch.zeros(size, dtype=torch.int32)
        place[:count] = batch.place
        tiles = torch.stack([own.row, torch.ones_like(own.row)], 1)
        parts = [table, own.row, place, tiles]
        if batch.mixture is not None:
            order, begins = batch.tiles_of_tokens
            starts = batch.mixture.starts
            parts += [
                torch.cat([order, order.new_zeros(size - len(order))]),
                torch.cat([begins, begins[-1:].expand(size + 1 - len(begins))]),
                torch.cat([starts, starts[-1:].expand(size - count)]),
            ]
            on, entries = own.on_gpu, len(batch.mixture.weights)
            assert on.parts is not None
            assert on.weights is not None
            moved, weights = batch.mixture.to(own.ids.device)
            on.parts[:, :entries].copy_(moved)
            on.weights[:entries].copy_(weights)
        numbers.copy_(torch.cat([part.flatten() for part in parts]), non_blocking=True)
