"""RandLoRA: a full-rank change from many frozen random low-rank pairs, of which only diagonals train.

    ΔW = s Σ_j B_j diag(λ_j) A diag(γ_j)          n = ⌈min(out, in) / rank⌉ pairs, s = alpha / rank

A (rank, smaller side) is one for all pairs, B_j (larger side, rank) each its own; where the input is the larger side the
change is the transpose. λ (rank, n) starts at zero, γ (n, smaller side) at 1 / its longest side. Both bases are shared by
all layers and drawn from a seed. A *smaller* rank means more pairs and more trained numbers. n · rank is at least the smaller
side, so an adapted layer costs about two of itself: the price of full rank. Lower the learning rate or alpha if it diverges.

PEFT flattens the pairs of B by (pair, rank) and those of A by (rank, pair) before multiplying, so that the k-th column of B
meets the k-th row of A in that order. All columns are drawn alike, so nothing is lost; here it is done the same way, so that
files agree. PEFT also stores both bases again under every layer; here they are written once, which PEFT loads to the same
function (it warns of missing keys). Albert et al. 2025, arXiv 2502.00987.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import Scaled, alpha_option, dropout_option, rank_option
from lorakit.methods.vera import OverPair, RandomPair


def _pairs(shape: Shape, rank: int) -> int:
    """n: how many low-rank pairs make up full rank."""
    return math.ceil(min(shape.out, shape.in_) / rank)


@dataclass(frozen=True, kw_only=True)
class RandLoRA(RandomPair, Scaled):
    """The options of RandLoRA."""

    name = "randlora"
    card = Card(
        title="RandLoRA",
        formula="ΔW = s Σ_j B_j diag(λ_j) A diag(γ_j); A, B random, frozen, shared by all layers",
        parameters=lambda shape, spec: _pairs(shape, spec.rank) * (spec.rank + min(shape.out, shape.in_)),
        paper="arXiv 2502.00987",
        use="When low rank is what limits quality; a full-rank change for LoRA's number of trained values.",
    )

    rank: int = rank_option(32, "rank of each random pair; smaller means more trained numbers", pattern=None)
    alpha: float = alpha_option(
        640.0, "numerator of the scale, alpha / rank; about 20 times the rank", peft="randlora_alpha", pattern=None
    )
    dropout: float = dropout_option("randlora_dropout", "probability with which an input is zeroed in training")
    basis: Literal["dense", "sparse", "very_sparse"] = option(
        "dense", "dense, or ternary with a sixth of +1 and of -1 (sparse) or with half of 1/√D of each (very_sparse)"
    )


class RandLoRADelta(OverPair, of=RandLoRA):
    """λ and γ of one matrix; the bases are the pool's."""

    spec: RandLoRA

    def __init__(self, spec: RandLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        self.count, self.side = _pairs(shape, spec.rank), min(shape.out, shape.in_)
        self.lambda_ = nn.Parameter(torch.zeros(spec.rank, self.count))
        self.gamma = nn.Parameter(torch.full((self.count, self.side), 1 / max(self.count, self.side)))
        self.projections()

    def draw(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        return _draw(self.spec, max(out, in_), min(out, in_))

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.projections()
        large = B[: max(self.shape.out, self.shape.in_), : self.count].flatten(1).to(self.gamma)
        small = (self.lambda_[:, :, None] * A[:, :, : self.side].to(self.gamma) * self.gamma).flatten(0, 1)
        return (large, small) if self.side == self.shape.in_ else (small.T, large.T)


def _draw(spec: RandLoRA, large: int, small: int) -> tuple[Tensor, Tensor]:
    """B (large, pairs, rank) and A (rank, 1, small) from the seed, each over its own deviation.

    Dense ones are drawn in bfloat16, one pair after the other, as PEFT does: the seed then gives the same values.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    pairs = math.ceil(small / spec.rank)
    if spec.basis == "dense":

        def uniform(*size: int) -> Tensor:
            bound = 1 / math.sqrt(size[1] * size[2])
            return torch.empty(size, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

        A = uniform(spec.rank, 1, small)
        B = torch.cat([uniform(large, 1, spec.rank) for _ in range(pairs)], dim=1)
    else:
        tail = 1 / (2 * (3 if spec.basis == "sparse" else math.sqrt(small)))

        def ternary(*size: int) -> Tensor:
            draw = torch.rand(size, generator=generator)
            return (draw > 1 - tail).float() - (draw < tail).float()

        A, B = ternary(spec.rank, 1, small), ternary(large, pairs, spec.rank)
    for name, basis in (("A", A), ("B", B)):
        if basis.unique().numel() < 2:
            raise LorakitError(
                f"randlora: the {spec.basis} basis {name} came out constant for rank {spec.rank} and sides {large} and "
                f'{small}; such small layers need basis="dense".'
            )
    return (B / B.std()).float(), (A / A.std()).float()
