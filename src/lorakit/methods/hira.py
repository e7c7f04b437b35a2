"""HiRA: a low-rank change relative to the weight it changes, so that ΔW has a high rank.

    ΔW = W ⊙ (B A)          A (rank, in), B (out, rank), B starts at zero

Every entry of W is scaled by `1 + (B A)_jk`. The rank of ΔW is up to that of W times the rank of B A. There is no alpha: the
change is relative already. The price is a matrix as large as W made in each step, which LoRA avoids. A 576 → 1536 layer at
rank 32 trains 32 · (576 + 1536) = 67,584 numbers. Where W is zero, ΔW stays zero.

For an embedding A, which meets the one-hot input, starts at zero. Huang et al. 2025 (ICLR), "HiRA: Parameter-efficient
Hadamard high-rank adaptation".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorakit.core.delta import Card
from lorakit.methods.lora import Trained
from lorakit.methods.options import Bounded, rank_option


@dataclass(frozen=True, kw_only=True)
class HiRA(Bounded):
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


class HiRADelta(Trained, of=HiRA):
    """A and B of one matrix."""

    def dense(self, W: Tensor) -> Tensor:
        return W * (self.B @ self.A)
