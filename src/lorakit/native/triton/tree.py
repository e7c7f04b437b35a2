"""Attention over shared prefixes as Triton kernels: what `train/step/tree.cpp` is on processors.

The runs of a packed batch lie in the order of a walk through their tree, each above those that hang on it. So a query
sees its own run up to itself and the runs above it whole, which is a walk upwards; and a key is seen by all rows from
its own to the end of what hangs on its run, which lie together.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.native.triton import power
from lorakit.native.triton.dot import dot

BLOCK = 64
"""Queries of one program, and keys that it takes at a time."""


@triton.jit
def _rows(tensor, row, real, head, heads, width, at):
    """Rows of one head, in the type they have: zeros where there is none."""
    place = (row[:, None].to(tl.int64) * heads + head) * width + at[None, :]
    return tl.load(tensor + place, mask=real[:, None] & (at[None, :] < width), other=0.0)


@triton.jit
def _attend(
    q, k, v, out, log_sums, runs, blocks, heads, key_heads, width, scale, window,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    key_head = head // (heads // key_heads)
    run, first = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    start, length, position = tl.load(runs + 4 * run), tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2)
    row = first + tl.arange(0, SIZE)
    real = row < start + length
    place = position + row - start
    at = tl.arange(0, WIDE)
    queries = _rows(q, row, real, head, heads, width, at)
    top = tl.full([SIZE], -1e30, tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    sums = tl.zeros([SIZE, WIDE], tl.float32)
    while run >= 0:
        start, length, position = tl.load(runs + 4 * run), tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2)
        end = tl.minimum(start + length, first + SIZE)
        for begin in range(start, end, SIZE):
            column = begin + tl.arange(0, SIZE)
            there = column < end
            keys = _rows(k, column, there, key_head, key_heads, width, at)
            scores = dot(queries, tl.trans(keys)) * scale
            seen = (row[:, None] >= column[None, :]) & there[None, :]
            if WINDOW:
                seen = seen & (place[:, None] - (position + column - start)[None, :] < window)
            scores = tl.where(seen, scores, -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            p = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
            shrunk = tl.exp(top - higher)
            values = _rows(v, column, there, key_head, key_heads, width, at)
            sums = sums * shrunk[:, None] + dot(p.to(values.dtype), values)
            total = total * shrunk + tl.sum(p, 1)
            top = higher
        run = tl.load(runs + 4 * run + 3)
    to = (row[:, None].to(tl.int64) * heads + head) * width + at[None, :]
    share = sums / tl.where(real, total, 1.0)[:, None]
    tl.store(out + to, share.to(out.dtype.element_ty), mask=real[:, None] & (at[None, :] < width))
    tl.store(log_sums + row.to(tl.int64) * heads + head, top + tl.log(tl.where(real, total, 1.0)), mask=real)


@triton.jit
def _of_queries(
    q, k, v, grad, log_sums, delta, dq, runs, blocks, heads, key_heads, width, scale, window,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    key_head = head // (heads // key_heads)
    run, first = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    start, length, position = tl.load(runs + 4 * run), tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2)
    row = first + tl.arange(0, SIZE)
    real = row < start + length
    place = position + row - start
    at = tl.arange(0, WIDE)
    queries = _rows(q, row, real, head, heads, width, at)
    given = _rows(grad, row, real, head, heads, width, at)
    of_row = row.to(tl.int64) * heads + head
    log_sum = tl.load(log_sums + of_row, mask=real, other=0.0)
    own = tl.load(delta + of_row, mask=real, other=0.0)
    sums = tl.zeros([SIZE, WIDE], tl.float32)
    while run >= 0:
        start, length, position = tl.load(runs + 4 * run), tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2)
        end = tl.minimum(start + length, first + SIZE)
        for begin in range(start, end, SIZE):
            column = begin + tl.arange(0, SIZE)
            there = column < end
            keys = _rows(k, column, there, key_head, key_heads, width, at)
            values = _rows(v, column, there, key_head, key_heads, width, at)
            seen = (row[:, None] >= column[None, :]) & there[None, :] & real[:, None]
            if WINDOW:
                seen = seen & (place[:, None] - (position + column - start)[None, :] < window)
            p = tl.where(seen, tl.exp(dot(queries, tl.trans(keys)) * scale - log_sum[:, None]), 0.0)
            slope = p * (dot(given, tl.trans(values)) - own[:, None]) * scale
            sums += dot(slope.to(keys.dtype), keys)
        run = tl.load(runs + 4 * run + 3)
    to = of_row[:, None] * width + at[None, :]
    tl.store(dq + to, sums.to(dq.dtype.element_ty), mask=real[:, None] & (at[None, :] < width))


@triton.jit
def _of_keys(
    q, k, v, grad, log_sums, delta, dk, dv, runs, ends, places, blocks, heads, key_heads, width, scale, window,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, key_head = tl.program_id(0), tl.program_id(1)
    fold = heads // key_heads
    run, first = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    column = first + tl.arange(0, SIZE)
    there = column < tl.load(runs + 4 * run) + tl.load(runs + 4 * run + 1)
    end = tl.load(ends + run)
    at = tl.arange(0, WIDE)
    keys = _rows(k, column, there, key_head, key_heads, width, at)
    values = _rows(v, column, there, key_head, key_heads, width, at)
    of_column = tl.load(places + column, mask=there, other=0)
    of_keys = tl.zeros([SIZE, WIDE], tl.float32)
    of_values = tl.zeros([SIZE, WIDE], tl.float32)
    for head in range(key_head * fold, key_head * fold + fold):
        for begin in range(first, end, SIZE):
            row = begin + tl.arange(0, SIZE)
            real = row < end
            queries = _rows(q, row, real, head, heads, width, at)
            given = _rows(grad, row, real, head, heads, width, at)
            log_sum = tl.load(log_sums + row.to(tl.int64) * heads + head, mask=real, other=0.0)
            own = tl.load(delta + row.to(tl.int64) * heads + head, mask=real, other=0.0)
            seen = (row[:, None] >= column[None, :]) & real[:, None] & there[None, :]
            if WINDOW:
                place = tl.load(places + row, mask=real, other=0)
                seen = seen & (place[:, None] - of_column[None, :] < window)
            p = tl.where(seen, tl.exp(dot(queries, tl.trans(keys)) * scale - log_sum[:, None]), 0.0)
            slope = p * (dot(given, tl.trans(values)) - own[:, None]) * scale
            of_values += dot(tl.trans(p.to(given.dtype)), given)
            of_keys += dot(tl.trans(slope.to(queries.dtype)), queries)
    to = (column[:, None].to(tl.int64) * key_heads + key_head) * width + at[None, :]
    inside = there[:, None] & (at[None, :] < width)
    tl.store(dk + to, of_keys.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + to, of_values.to(dv.dtype.element_ty), mask=inside)


class Tree:
    """The runs of a batch on a GPU, from start, length, position and parent of each, int64 `[runs, 4]` on the host.

    Attributes:
        runs: the same, int32; ends: the row behind all that hangs on each; places: the position of each row.
        blocks: run and first row of every piece of at most `BLOCK` rows of one run.
    """

    def __init__(self, runs: Tensor, device: torch.device) -> None:
        rows: list[list[int]] = runs.tolist()
        ends = [start + length for start, length, *_ in rows]
        for index in range(len(rows) - 1, -1, -1):
            if (parent := rows[index][3]) >= 0:
                ends[parent] = max(ends[parent], ends[index])
        blocks = [
            (index, start + step) for index, (start, length, *_) in enumerate(rows) for step in range(0, length, BLOCK)
        ]
        places = [position + step for _, length, position, _ in rows for step in range(length)]
        parts = [torch.tensor(one, dtype=torch.int32).flatten() for one in (rows, ends, places, blocks)]
        # One copy; it does not wait where the host's memory is pinned.
        whole = torch.cat(parts)
        whole = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
        self.runs, self.ends, self.places, self.blocks = whole.split([len(part) for part in parts])
        self.count = len(blocks)


def walks(runs: Tensor) -> bool:
    """Do the runs lie in the order of a walk through their tree, one behind the other?"""
    rows: list[list[int]] = runs.tolist()
    above: list[int] = []
    end = 0
    for index, (start, length, _, parent) in enumerate(rows):
        while above and above[-1] != parent:
            above.pop()
        if start != end or (parent >= 0 and not above):
            return False
        above.append(index)
        end = start + length
    return True


def _constants(q: Tensor, window: int | None) -> dict[str, Any]:
    return {"WINDOW": window is not None, "SIZE": BLOCK, "WIDE": power(q.shape[2], 16)}


def attend(q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """The output of `TreeAttention`, and the log of the sum of each query and head, float32 `[tokens, heads]`."""
    out, log_sums = torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)
    shape = (q.shape[1], k.shape[1], q.shape[2], scale, window or 0)
    _attend[tree.count, q.shape[1]](
        q, k, v, out, log_sums, tree.runs, tree.blocks, *shape, **_constants(q, window)
    )  # fmt: skip
    return out, log_sums


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    grad: Tensor,
    tree: Tree,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad.float() * out.float()).sum(-1)
    shape = (q.shape[1], k.shape[1], q.shape[2], scale, window or 0)
    given, constants = (q, k, v, grad, log_sums, delta), _constants(q, window)
    _of_queries[tree.count, q.shape[1]](*given, dq, tree.runs, tree.blocks, *shape, **constants)
    _of_keys[tree.count, k.shape[1]](
        *given, dk, dv, tree.runs, tree.ends, tree.places, tree.blocks, *shape, **constants
    )  # fmt: skip
    return dq, dk, dv
