"""MoRA: one square matrix instead of two thin ones, between a fixed compression and decompression.

    ΔW x = g(M f(x))          M (side, side), side = round(√(rank · (out + in))): LoRA's number of values, at a higher rank

The paper has several pairs f, g; here are the two it recommends and its code calls type 1 and type 6.

    "sharing"   (type 1, equation 6)  f adds the inputs whose number is equal modulo `side`, g repeats M's output.
                                      For large ranks.
    "rotation"  (type 6, equation 9)  x is cut into segments of `side`, each turned by rotary angles that tell its position
                                      apart, each multiplied by M, and put one after the other. For small ranks.

A last segment that is not full goes on with x's first entries, and an output longer than the result repeats it, as in the
authors' code. For "rotation" the side is rounded down to an even number. M starts at zero; there is no scale. On an embedding
tokens that are equal modulo `side` share their change: not advisable. Jiang et al. 2024, arXiv 2405.12130.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Delta, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import Bounded, rank_option


def side(shape: Shape, spec: Any) -> int:
    """The width of M for a matrix."""
    width = int(math.sqrt((shape.out + shape.in_) * spec.rank) + 0.5)
    return width // 2 * 2 if spec.kind == "rotation" else width


@dataclass(frozen=True, kw_only=True)
class MoRA(Bounded):
    """The options of MoRA."""

    name = "mora"
    card = Card(
        title="MoRA",
        formula="ΔW x = g(M f(x)), M square; f, g fixed",
        parameters=lambda shape, spec: side(shape, spec) ** 2,
        paper="arXiv 2405.12130",
        use="When the model has to memorise new facts, where low rank falls behind.",
    )

    beyond = ", so that M would hold more than the matrix it changes"

    rank: int = rank_option(8, "rank of the LoRA that has about as many trained values")
    kind: Literal["rotation", "sharing"] = option(
        "rotation",
        "how inputs are compressed: rotation for small ranks, sharing for large ones",
        peft="mora_type",
        from_peft=lambda value: "rotation" if value == 6 else "sharing",
        to_peft=lambda kind: 6 if kind == "rotation" else 1,
    )

    def build(self, shape: Shape, pool: Pool) -> Delta:
        return (RotationDelta if self.kind == "rotation" else SharingDelta)(self, shape, pool)


def _padded(shape: Shape, width: int, device: torch.device) -> Tensor:
    """The numbers of the inputs, cut to whole segments: the last one goes on with the first inputs."""
    return torch.arange(math.ceil(shape.in_ / width) * width, device=device) % shape.in_


class MoRADelta(Delta):
    """M (side, side) of one matrix."""

    def __init__(self, spec: MoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        width = side(shape, spec)
        self.M = nn.Parameter(torch.zeros(width, width))


class SharingDelta(MoRADelta, LowRank):
    """M, between sums of inputs and repeated outputs: a low-rank pair, A of zeros and ones, B of M's rows."""

    def factors(self) -> tuple[Tensor, Tensor]:
        width, device = self.M.shape[0], self.M.device
        columns = _padded(self.shape, width, device)
        rows = torch.arange(columns.numel(), device=device) % width
        ones = self.M.new_ones(columns.numel())
        A = self.M.new_zeros(width, self.shape.in_).index_put((rows, columns), ones, accumulate=True)
        B = self.M.index_select(0, torch.arange(self.shape.out, device=device) % width)
        return B, A


class RotationDelta(MoRADelta):
    """M, applied to every segment of the input, each turned by its own angles."""

    def turned(self, dtype: torch.dtype) -> Tensor:
        """M R_s for every segment s: (segments, side, side); R_s turns entry k against entry k + side/2."""
        width, half = self.M.shape[0], self.M.shape[0] // 2
        M = self.M.to(dtype)
        frequency = 10000.0 ** (-torch.arange(half, device=M.device, dtype=torch.float64) / half)
        segments = torch.arange(math.ceil(self.shape.in_ / width), device=M.device, dtype=torch.float64)
        angle = (segments[:, None] * frequency).repeat(1, 2)[:, None, :]  # (segments, 1, side), for M's columns
        swapped = torch.cat([M[:, half:], -M[:, :half]], dim=1)
        return M * angle.cos().to(dtype) + swapped * angle.sin().to(dtype)

    def dense(self, W: Tensor) -> Tensor:
        blocks = self.turned(self.M.dtype)
        whole = torch.block_diag(*blocks)
        rows = torch.arange(self.shape.out, device=whole.device) % whole.shape[0]
        columns = _padded(self.shape, blocks.shape[-1], whole.device)
        zero = whole.new_zeros(self.shape.out, self.shape.in_)
        change: Tensor = zero.index_add(1, columns, whole.index_select(0, rows))
        return change

    def act(self, call: Call) -> Tensor:
        return call.through(self.segmentwise, lambda: self.dense(call.W))

    def segmentwise(self, x: Tensor) -> Tensor:
        """ΔW x without ΔW: (..., in) -> (..., out)."""
        blocks = self.turned(self.M.dtype).to(x.dtype)
        width = blocks.shape[-1]
        parts = x[..., _padded(self.shape, width, x.device)].unflatten(-1, (-1, width))
        y = torch.einsum("...sq,spq->...sp", parts, blocks).flatten(-2)
        return y[..., torch.arange(self.shape.out, device=x.device) % y.shape[-1]]
