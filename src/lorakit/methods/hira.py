"""HiRA: a low-rank change relative to the weight it changes, so that ΔW has a high rank.

    ΔW = W ⊙ (B A)          A (rank, in), B (out, rank), B starts at zero

Every entry of W is scaled by `1 + (B A)_jk`. The rank of ΔW is up to that of W times the rank of B A. There is no alpha: the
change is relative already. The price is a matrix as large as W made in each step, which LoRA avoids. A 576 → 1536 layer at
rank 32 trains 32 · (576 + 1536) = 67,584 numbers. Where W is zero, ΔW stays zero.

For an embedding A, which meets the one-hot input, starts at zero. Huang et al. 2025 (ICLR), "HiRA: Parameter-efficient
Hadamard high-rank adaptation".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape
from lorakit.methods.options import check_rank_fits, rank_option


@dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    """The options of HiRA."""

    name = "hira"
    card = Card(
        title="HiRA",
        formula="ΔW = W ⊙ (B A)",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_),
        paper="ICLR 2025 (HiRA)",
        use="When LoRA's rank limits and memory for one matrix per layer is there.",
        limits="The rank is at most the smaller side of the matrix; zeros of W stay zero.",
    )

    rank: int = rank_option(32, "rank of the factor that multiplies the weight")

    def check(self, shape: Shape, path: str) -> None:
        check_rank_fits(self.rank, shape, path)


class HiRADelta(Delta, of=HiRA):
    """A and B of one matrix."""

    def __init__(self, spec: HiRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.A = nn.Parameter(torch.zeros(spec.rank, shape.in_))
        self.B = nn.Parameter(torch.zeros(shape.out, spec.rank))
        if shape.lookup:
            nn.init.normal_(self.B)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def dense(self, W: Tensor) -> Tensor:
        return W * (self.B @ self.A)

    def roles(self) -> dict[str, str]:
        return {"A": "B", "B": "A"} if self.shape.lookup else {}
