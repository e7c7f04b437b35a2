"""Attention of the server over its pages as Triton kernels: what `attend` of `serve/model/native.cpp` is on processors."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorakit.native.triton import power
from lorakit.native.triton.dot import dot

SPAN = 64
"""Keys that a program takes at a time."""


@triton.jit
def _write(
    key, value, keys, values, table, row, place, pages, heads, width, value_width,
    k_head, k_token, v_head, v_token, PAGE: tl.constexpr, WIDE: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    run, at = tl.load(row + token), tl.load(place + token)
    page = tl.load(table + run * pages + at // PAGE).to(tl.int64)
    slot = at % PAGE
    d = tl.arange(0, WIDE)
    given = tl.load(key + head * k_head + token * k_token + d, mask=d < width)
    tl.store(keys + ((page * heads + head) * width + d) * PAGE + slot, given, mask=d < width)
    d = tl.arange(0, VALUE)
    given = tl.load(value + head * v_head + token * v_token + d, mask=d < value_width)
    tl.store(values + ((page * heads + head) * PAGE + slot) * value_width + d, given, mask=d < value_width)


@triton.jit
def _attend(
    query, keys, values, out, table, row, place, tiles, sinks, pages, heads, key_heads, width, value_width,
    q_head, q_token, scale, softcap, window, PAGE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    tile, key_head = tl.program_id(0), tl.program_id(1)
    fold = heads // key_heads
    first, count = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    row_of = tl.arange(0, ROWS)
    token, head = first + row_of // fold, key_head * fold + row_of % fold
    real = row_of < count * fold
    here = tl.load(place + token, mask=real, other=-1)
    run = tl.load(row + first)
    d, e = tl.arange(0, WIDE), tl.arange(0, VALUE)
    at = token[:, None].to(tl.int64) * q_token + head[:, None] * q_head + d[None, :]
    queries = tl.load(query + at, mask=real[:, None] & (d[None, :] < width), other=0.0)
    if SINKS:
        top = tl.load(sinks + head, mask=real, other=0.0)
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE], tl.float32)
    begin = 0
    if WINDOW:  # what lies before the first query's window nobody sees
        begin = tl.maximum(tl.load(place + first) - window + 1, 0) // SPAN * SPAN
    end = tl.load(place + first + count - 1) + 1
    for at_key in range(begin, end, SPAN):
        there = at_key + tl.arange(0, SPAN)
        inside = there < end
        page = tl.load(table + run * pages + there // PAGE, mask=inside, other=0).to(tl.int64)
        slot = there % PAGE
        place_k = (page[None, :] * key_heads + key_head) * width * PAGE + d[:, None] * PAGE + slot[None, :]
        some = tl.load(keys + place_k, mask=inside[None, :] & (d[:, None] < width), other=0.0)
        scores = dot(queries, some) * scale
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        seen = (there[None, :] <= here[:, None]) & inside[None, :]
        if WINDOW:
            seen = seen & (here[:, None] - there[None, :] < window)
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        shrunk = tl.exp(top - higher)
        place_v = ((page[:, None] * key_heads + key_head) * PAGE + slot[:, None]) * value_width + e[None, :]
        theirs = tl.load(values + place_v, mask=inside[:, None] & (e[None, :] < value_width), other=0.0)
        sums = sums * shrunk[:, None] + dot(p.to(theirs.dtype), theirs)
        total = total * shrunk + tl.sum(p, 1)
        top = higher
    to = (token[:, None].to(tl.int64) * heads + head[:, None]) * value_width + e[None, :]
    share = sums / tl.where(real, total, 1.0)[:, None]
    tl.store(out + to, share.to(out.dtype.element_ty), mask=real[:, None] & (e[None, :] < value_width))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    row: Tensor,
    place: Tensor,
    tiles: Tensor,
    together: int,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> Tensor:
    """Write new keys and values into their pages and attend over them.

    Args:
        query: (1, heads, tokens, d); key, value: (1, key heads, tokens, width), each with a contiguous last axis.
        keys, values: pages of one layer (`Cache`); table, row, place, tiles: of the step (`Batch`), on the GPU.
        together: the most tokens of a tile.
        softcap, window: 0 for none.

    Returns:
        (1, tokens, heads, value width).
    """
    _, heads, tokens, width = query.shape
    _, key_heads, _, value_width = value.shape
    page = values.shape[2]
    wide, wide_value = power(width, 16), power(value_width, 16)
    out = query.new_empty(1, tokens, heads, value_width)
    _write[tokens, key_heads](
        key, value, keys, values, table, row, place, table.shape[1], key_heads, width, value_width,
        key.stride(1), key.stride(2), value.stride(1), value.stride(2), PAGE=page, WIDE=wide, VALUE=wide_value,
    )  # fmt: skip
    rows = power(together * (heads // key_heads), 16)
    _attend[len(tiles), key_heads](
        query, keys, values, out, table, row, place, tiles, query if sinks is None else sinks, table.shape[1], heads,
        key_heads, width, value_width, query.stride(1), query.stride(2), scale, softcap or 1.0, window, PAGE=page,
        SOFTCAP=bool(softcap), WINDOW=bool(window), SINKS=sinks is not None, ROWS=rows, SPAN=SPAN, WIDE=wide,
        VALUE=wide_value,
    )  # fmt: skip
    return out
