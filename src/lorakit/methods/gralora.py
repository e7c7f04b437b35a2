"""GraLoRA: a LoRA of its own for every block of the weight, at the numbers of one LoRA.

    ΔW = s · [Δ_jn], j, n < k          Δ_jn = (A_n[:, j-th slice] B_j[n-th slice, :])ᵀ of rank / k, s = alpha / (rank + hybrid)

W is cut into k × k blocks. A (k, in / k, rank) and B (k, rank, out / k): the columns of A_n and the rows of B_j are cut into k
slices of rank / k, a pair of slices for each block. The change has rank k · rank. `hybrid` gives some rank to a plain LoRA of
the whole matrix beside it. B starts at zero. Jung et al. 2025, arXiv 2505.20355.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.lora import start_factors
from lorakit.methods.options import alpha_option, check_divides_sides, dropout_option, rank_option


@dataclass(frozen=True, kw_only=True)
class GraLoRA(Method):
    """The options of GraLoRA."""

    name = "gralora"
    card = Card(
        title="GraLoRA",
        formula="ΔW = s (k × k blocks B_jn A_jn), each of rank / k",
        parameters=lambda shape, spec: (spec.rank + spec.hybrid) * (shape.out + shape.in_),
        paper="arXiv 2505.20355",
        use="At high ranks, where single LoRAs stop gaining.",
        limits="`blocks` divides the rank and both sides of every matrix",
    )

    rank: int = rank_option(32, "columns of every A and rows of every B", pattern=None)
    hybrid: int = option(0, "rank of a plain LoRA of the whole matrix beside it", minimum=0, peft="hybrid_r")
    blocks: int = option(2, "k: into how many blocks each side is cut", minimum=1, peft="gralora_k")
    alpha: float = alpha_option(64.0, "numerator of the scale, alpha / (rank + hybrid)", peft="alpha", pattern=None)
    dropout: float = dropout_option("gralora_dropout", "probability with which an input is zeroed in training")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.blocks:
            raise LorakitError(f"gralora: blocks={self.blocks} does not divide rank={self.rank}.")

    def check(self, shape: Shape, path: str) -> None:
        check_divides_sides("blocks", self.blocks, shape, path)


class GraLoRADelta(LowRank, of=GraLoRA):
    """A and B of the blocks of one matrix, and those of the plain LoRA."""

    def __init__(self, spec: GraLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        k, rank = spec.blocks, spec.rank
        self.scale = spec.alpha / (rank + spec.hybrid)
        bound = math.sqrt(k / shape.in_)
        # the factor that meets an embedding's one-hot input starts at zero, as LoRA's does
        ends = (0.0, 1.0) if shape.lookup else (bound, 0.0)
        A, B = (torch.empty(size).uniform_(-end, end) if end else torch.zeros(size)
                for size, end in zip(((k, shape.in_ // k, rank), (k, rank, shape.out // k)), ends, strict=True))  # fmt: skip
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        if spec.hybrid:
            whole = start_factors(shape, spec.hybrid)
            self.whole_B, self.whole_A = map(nn.Parameter, whole)

    def factors(self) -> tuple[Tensor, Tensor]:
        k, rank = self.A.shape[0], self.A.shape[2]
        A = torch.block_diag(*self.A.mT)
        slices = self.B.unflatten(1, (k, -1))  # of block j: (n, rank / k, out / k)
        B = torch.stack([torch.block_diag(*column) for column in slices.unbind(1)])  # (n, k · rank / k, out)
        B = B.reshape(k * rank, -1).T
        if not hasattr(self, "whole_A"):
            return B, A
        return torch.cat([B, self.whole_B], dim=1), torch.cat([A, self.whole_A])

    def roles(self) -> dict[str, str]:
        turned = {"A": "B", "B": "A", "whole_A": "B", "whole_B": "A"}
        return turned if self.shape.lookup else {"whole_A": "A", "whole_B": "B"}
