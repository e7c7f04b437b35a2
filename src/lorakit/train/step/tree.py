"""Attention over a packed batch over the tree of its runs, forward and backward: in C++ on a processor (`tree.cpp`), in
Triton on a GPU (`native/triton/tree.py`).

It takes the place of batched_attention.py where there is a compiler or a GPU and nothing is special about the scores:
that one copies each run's queries, keys and values into padded lanes and back, and takes forty calls a layer. Sums are
in float32.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.native import INTEGER, POINTER, REAL, TYPES, Library, triton
from lorakit.train.step.packing import PackedBatch

log = logging.getLogger("lorakit.train")

MULTIPLE = 16
"""The width of a head must be a multiple of this: the floats of one vector."""

WORKERS = 16
"""Threads that the backward pass shares its work among at most: each keeps a sum of its own for keys that several see."""

MOST = 256
"""The widest head on a GPU: a block of keys must fit into what one of its cores holds."""

_SHAPE = (POINTER, *[INTEGER] * 6, REAL, INTEGER)
LIBRARY = Library(
    Path(__file__).with_suffix(".cpp"),
    {"attend": (*_SHAPE, *[POINTER] * 5), "attend_backward": (*_SHAPE, *[POINTER] * 9, INTEGER)},
)


@functools.cache
def _available() -> bool:
    if LIBRARY.obstacle is not None:
        log.info("attention runs in PyTorch, not in C++: %s", LIBRARY.obstacle)
    return LIBRARY.obstacle is None


def suits(batch: PackedBatch, q: Tensor) -> bool:
    """Can the C++, or the Triton kernels, take these queries `[..., head_dim]`?"""
    if q.is_cuda:
        runs = None if triton.obstacle(q.device, q.dtype) is not None or q.shape[-1] > MOST else runs_of(batch)
        return runs is not None and _kernels().walks(runs)
    if q.device.type != "cpu" or q.dtype not in TYPES or q.shape[-1] % MULTIPLE:
        return False
    return _available() and runs_of(batch) is not None


def _kernels() -> Any:
    from lorakit.native.triton import tree

    return tree


def tree_on(batch: PackedBatch, device: torch.device) -> Any:
    """The tree as the Triton kernels read it, made once for a batch."""
    if device not in batch.plans:
        batch.plans[device] = _kernels().Tree(runs_of(batch), device)
    return batch.plans[device]


def runs_of(batch: PackedBatch) -> Tensor | None:
    """The tree as the C++ reads it: start, length, position and parent of each run, int64 `[runs, 4]`; None where a
    run's position is not the number of tokens above it."""
    if "tree" not in batch.plans:
        segments = batch.segments
        ends = {-1: 0, **{index: one.position + one.length for index, one in enumerate(segments)}}
        fits = all(one.position == ends[one.parent] for one in segments)
        rows = [(one.start, one.length, one.position, one.parent) for one in segments]
        batch.plans["tree"] = torch.tensor(rows, dtype=torch.int64) if fits else None
    tree: Tensor | None = batch.plans["tree"]
    return tree


class TreeAttention(torch.autograd.Function):
    """q `[tokens, query_heads, head_dim]`, k and v `[tokens, key_heads, head_dim]`, all contiguous -> output like q.

    Kept for the backward pass: those, the output, and one number for each query. Rows behind the last real token give zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float, window: int | None
    ) -> Tensor:
        runs = runs_of(batch)
        assert runs is not None  # `suits` has looked
        if q.is_cuda:
            ctx.shape = (tree_on(batch, q.device), scale, window)
            out, log_sums = _kernels().attend(q, k, v, *ctx.shape)
            ctx.save_for_backward(None, q, k, v, out, log_sums)
            return out  # type: ignore[no-any-return]
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.shape = (len(runs), batch.tokens, batch.used, q.shape[1], k.shape[1], q.shape[2], scale, window or 0)
        LIBRARY.call("attend", q.dtype, runs, *ctx.shape, q, k, v, out, log_sums)
        ctx.save_for_backward(runs, q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        runs, q, k, v, out, log_sums = ctx.saved_tensors
        if q.is_cuda:
            return (
                *_kernels().attend_backward(q, k, v, out, log_sums, grad.contiguous(), *ctx.shape),
                None,
                None,
                None,
            )
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        workers = min(torch.get_num_threads(), WORKERS)
        given = (q, k, v, out, log_sums, grad.contiguous())
        LIBRARY.call("attend_backward", q.dtype, runs, *ctx.shape, *given, dq, dk, dv, workers)
        return dq, dk, dv, None, None, None
