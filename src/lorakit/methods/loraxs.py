"""LoRA-XS: the weight's own leading singular directions, frozen, and a small trained matrix between them.

    ΔW = s B R A          W ≈ U S Vᵀ, B = U_r (out, rank), A = S_r V_rᵀ (rank, in), R (rank, rank) trained, s = alpha / rank

R starts at N(0, 1e-5²), which changes the model by about 1e-5; `start=0` makes the start exact, and R still trains, since
neither A nor B is zero. The singular values are on the input side alone: putting √S on both sides is another method.
A and B are saved with the adapter, so that no decomposition has to be repeated bit for bit elsewhere. Learning rates are
well above LoRA's (1e-3 to 4e-3). Bałazy et al. 2024, arXiv 2405.17604.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.core.spectrum import triplets
from lorakit.methods.options import Bounded, Scaled, alpha_option, dropout_option, rank_option


@dataclass(frozen=True, kw_only=True)
class LoRAXS(Bounded, Scaled):
    """The options of LoRA-XS."""

    name = "lora-xs"
    card = Card(
        title="LoRA-XS",
        formula="ΔW = s B R A; B, A the leading singular directions of W, frozen",
        parameters=lambda shape, spec: spec.rank**2,
        paper="arXiv 2405.17604",
        use="When the number of trained values must not depend on the model's width.",
        limits="the rank is at most the smaller side of the matrix",
        identity=False,
    )

    rank: int = rank_option(64, "how many singular directions; R is (rank, rank)")
    alpha: float = alpha_option(64.0)
    dropout: float = dropout_option()
    start: float = option(1e-5, "standard deviation of R at the start", minimum=0)
    iterations: int | None = option(
        10, "power iterations of a randomised decomposition; null decomposes exactly, which is slow", minimum=0
    )


class LoRAXSDelta(LowRank, of=LoRAXS):
    """R of one matrix, and the frozen A and B, which are known once the weight is."""

    spec: LoRAXS

    def __init__(self, spec: LoRAXS, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        self.R = nn.Parameter(torch.randn(spec.rank, spec.rank) * spec.start)
        self.register_buffer("A", torch.zeros(spec.rank, shape.in_))
        self.register_buffer("B", torch.zeros(shape.out, spec.rank))
        self.A: Tensor
        self.B: Tensor

    def begin(self, W: Tensor) -> None:
        rank = self.spec.rank
        U, S, V = triplets(W.detach().to(self.A.dtype), rank, self.spec.iterations, tries=rank + 10)
        self.B.copy_(U)
        self.A.copy_((V * S).mT)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B @ self.R, self.A
