"""LoRA-GA: the first step of the adapter goes where the first step of the full weight would.

    G = dL/dW, mean over batches      U S Vᵀ = svd(G)      A = z V₁ᵀ, B = z U₂, with disjoint index sets 1 and 2
    y = (W - s B₀ A₀ + s B A) x

The first gradient step changes s B A by about -η s² (B Bᵀ G + G Aᵀ A), which with these directions is proportional to the
best approximation of G at rank 2r. The singular values are not used. z = out^¼ / √γ ("stable"). Wang et al. 2024,
arXiv 2407.05000; the paper's theory has rslora=True. Directions and scales are those of the paper and the authors' code;
PEFT's version differs: it multiplies B by the singular values and leaves A unscaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.core.delta import Shape
from lorakit.core.options import option
from lorakit.core.spectrum import triplets
from lorakit.errors import LorakitError
from lorakit.init.initialiser import Factors, Initialiser, Start


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Initialiser):
    """Singular directions of the weight's gradient."""

    name = "lora-ga"
    needs = "gradients"
    shifts = True
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = option(
        "ArB2r",
        "which of the first 2 · rank directions A and B take: ArB2r first half and second, A2rBr the reverse, ArBr in turn",
    )
    size: Literal["stable", "gd", "unit", "weight"] = option(
        "stable", "stable: out^¼ / √gamma for both; gd: 1 / s; unit: 1; weight: as large as the weight's components"
    )
    gamma: float = option(16.0, "the constant of size stable; 16, or 64 with rslora", above=0)
    iterations: int | None = option(4, "subspace iterations of the decomposition; null for an exact one", minimum=0)
    examples: int = option(128, "training examples that a run measures on", minimum=1)

    def check(self, shape: Shape, rank: int, path: str) -> None:
        smallest = min(shape.out, shape.in_)
        if 2 * rank > smallest:
            raise LorakitError(
                f"attach: init='lora-ga' takes different directions for A and for B, twice the rank, and {path} has "
                f"{smallest}; give it a rank of at most {smallest // 2}."
            )

    def factors(self, start: Start) -> Factors:
        G: Tensor = start.statistic
        if not bool(G.any()):
            raise LorakitError(
                f"attach: init='lora-ga' found a gradient of zero for {start.path}; do the batches have labels?"
            )
        rank = start.rank
        U, _, V = triplets(G, 2 * rank, self.iterations, tries=4 * rank)
        order = torch.randperm(2 * rank) if self.direction == "random" else torch.arange(2 * rank)
        if self.direction == "ArBr":
            order = torch.cat([order[0::2], order[1::2]])
        first, second = order.to(U.device).chunk(2)
        if self.direction == "A2rBr":
            first, second = second, first
        z = self._size(start)
        return Factors(z * U[:, second], z * V[:, first].mT)

    def _size(self, start: Start) -> float:
        if self.size == "stable":
            return float(start.shape.out**0.25 / self.gamma**0.5)
        if self.size == "gd":
            return 1.0 / start.root_scale(self.name) ** 2
        if self.size == "weight":
            _, S, _ = triplets(start.W, start.rank, self.iterations)
            return float(S.sqrt().mean()) / start.root_scale(self.name)
        return 1.0
