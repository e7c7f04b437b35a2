"""The grouped product over adapters of a step as Triton kernels: `y += Σ weight (gain · y + bias + B A x)`, to each
token its own.

Tokens with the same adapters stand in tiles. `_shrink` makes `A x` of a tile for each of its adapters, of their own ranks;
`_expand` adds `B` times that, and the rest. Factors are read where they lie, by their addresses.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorakit.native.triton import power
from lorakit.native.triton.dot import dot

TILE = 16
"""Tokens of a tile: the least that a GPU's matrix units take."""

WIDTH = 64
"""Inputs, or outputs, that a program takes at a time."""


@triton.jit
def _shrink(
    x, by_token, h, parts, starts, row, order, begins, width, slots, most,
    TILE: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile, slot, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(begins + tile), tl.load(begins + tile + 1)
    if begin < end:
        run = tl.load(row + tl.load(order + begin))
        entry = tl.load(starts + run) + slot
        if entry < tl.load(starts + run + 1):
            address, rank = tl.load(parts + entry * 5), tl.load(parts + entry * 5 + 4)
            if (address != 0) & (block * RANKS < rank):
                A = address.to(tl.pointer_type(x.dtype.element_ty))
                place = tl.arange(0, TILE)
                real = begin + place < end
                token = tl.load(order + begin + place, mask=real, other=0).to(tl.int64)
                r = block * RANKS + tl.arange(0, RANKS)
                sums = tl.zeros([TILE, RANKS], tl.float32)
                for start in range(0, width, WIDTH):
                    at = start + tl.arange(0, WIDTH)
                    inside = at < width
                    own = tl.load(
                        x + token[:, None] * by_token + at[None, :], mask=real[:, None] & inside[None, :], other=0.0
                    )
                    factor = tl.load(
                        A + r[None, :] * width + at[:, None], mask=inside[:, None] & (r[None, :] < rank), other=0.0
                    )
                    sums += dot(own, factor)
                to = ((tile * slots + slot) * TILE + place[:, None]) * most + r[None, :]
                tl.store(h + to, sums.to(h.dtype.element_ty), mask=real[:, None] & (r[None, :] < rank))


@triton.jit
def _expand(
    x, x_token, h, y, y_token, parts, starts, weights, row, order, begins, out, slots, most,
    TILE: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(begins + tile), tl.load(begins + tile + 1)
    if begin < end:
        kind = x.dtype.element_ty
        run = tl.load(row + tl.load(order + begin))
        place = tl.arange(0, TILE)
        real = begin + place < end
        token = tl.load(order + begin + place, mask=real, other=0).to(tl.int64)
        n = block * WIDTH + tl.arange(0, WIDTH)
        inside = n < out
        where = y + token[:, None] * y_token + n[None, :]
        base = tl.load(where, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        change = tl.zeros([TILE, WIDTH], tl.float32)
        first = tl.load(starts + run)
        for entry in range(first, tl.load(starts + run + 1)):
            has_A, address, rank = (
                tl.load(parts + entry * 5),
                tl.load(parts + entry * 5 + 1),
                tl.load(parts + entry * 5 + 4),
            )
            gain, bias = tl.load(parts + entry * 5 + 2), tl.load(parts + entry * 5 + 3)
            sums = tl.zeros([TILE, WIDTH], tl.float32)
            if address != 0:
                B = address.to(tl.pointer_type(kind))
                for start in range(0, rank, RANKS):
                    r = (start + tl.arange(0, RANKS)).to(tl.int64)
                    ranks = r < rank
                    if has_A != 0:
                        at = ((tile * slots + entry - first) * TILE + place[:, None]) * most + r[None, :]
                        inner = tl.load(h + at, mask=real[:, None] & ranks[None, :], other=0.0)
                    else:  # a dense change: its B is (in, out)
                        inner = tl.load(
                            x + token[:, None] * x_token + r[None, :], mask=real[:, None] & ranks[None, :], other=0.0
                        )
                    factor = tl.load(
                        B + r[:, None] * out + n[None, :], mask=ranks[:, None] & inside[None, :], other=0.0
                    )
                    sums += dot(inner, factor)
            if gain != 0:
                sums += (
                    base * tl.load(gain.to(tl.pointer_type(kind)) + n, mask=inside, other=0.0).to(tl.float32)[None, :]
                )
            if bias != 0:
                sums += tl.load(bias.to(tl.pointer_type(kind)) + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            change += sums * tl.load(weights + entry)
        tl.store(where, (base + change).to(y.dtype.element_ty), mask=real[:, None] & inside[None, :])


def adapt(
    x: Tensor,
    y: Tensor,
    parts: Tensor,
    starts: Tensor,
    weights: Tensor,
    row: Tensor,
    order: Tensor,
    begins: Tensor,
    slots: int,
    rank: int,
) -> None:
    """Add to a layer's outputs, in place, what the adapters of a step make of its inputs.

    Args:
        x: (tokens, in); y: (tokens, out); rows may lie apart.
        parts: (entries, 5) int64: addresses of A, B, gain, bias (0: none), and the rank, of one layer.
        starts, weights: of the step's `Mixture`; row: the run of each token.
        order, begins: the tokens with adapters, those with the same ones together, and where each tile of `TILE` begins.
        slots: the most adapters that a run has. rank: the largest rank.
    """
    tiles = len(begins) - 1
    if tiles <= 0:
        return
    out, width = y.shape[1], x.shape[1]
    ranks = min(power(rank, 16), 64)
    h = x.new_empty(tiles * slots * TILE * rank)
    _shrink[tiles, slots, triton.cdiv(rank, ranks)](
        x, x.stride(0), h, parts, starts, row, order, begins, width, slots, rank, TILE=TILE, RANKS=ranks, WIDTH=WIDTH
    )
    _expand[tiles, triton.cdiv(out, WIDTH)](
        x, x.stride(0), h, y, y.stride(0), parts, starts, weights, row, order, begins, out, slots, rank,
        TILE=TILE, RANKS=ranks, WIDTH=WIDTH,
    )  # fmt: skip
