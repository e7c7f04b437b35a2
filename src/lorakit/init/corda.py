"""CorDA: the weight is decomposed as its inputs see it, and the adapter takes the parts that matter most, or least.

    C = mean of XᵀX over samples      U S Vᵀ = svd(W C)      B = U_k √(S_k / s)      A = √(S_k / s) V_kᵀ C⁻¹
    y = (W - s B₀ A₀ + s B A) x

"knowledge" takes the last rank components, so that what the samples need stays frozen: measure on questions about what
the model must keep. "instruction" takes the first: measure on the data to be learned. Yang et al. 2024, arXiv 2406.05223.
C is the second moment and not its root, as in the authors' code: the criterion is ‖(·) C‖.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.core.delta import Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.init.initialiser import Factors, Initialiser, Start

_TRUSTED = 0.05
"""‖C̃ C̃⁻¹ - I‖ below which an inverse is used."""


class SecondMoment:
    """The mean of XᵀX over samples, each first divided by |max X| (the largest entry, not the largest magnitude)."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None

    def add(self, samples: Sequence[Tensor]) -> None:
        for X in samples:
            if not len(X):
                continue
            largest = X.max().abs()
            X = X / torch.where(largest > 0, largest, 1.0)
            C = X.mT @ X
            self.total = C if self.total is None else self.total.add_(C)
            self.count += 1

    def mean(self) -> Tensor:
        """C, (in, in)."""
        assert self.total is not None
        return self.total / self.count


def damped(C: Tensor, damping: float, path: str) -> tuple[Tensor, Tensor]:
    """C with as much of its mean diagonal added as it takes to invert it well; and the inverse."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    size = C.diagonal().mean()
    for _ in range(64):
        safe = C + damping * size * eye
        inverse, failed = torch.linalg.inv_ex(safe)
        if not failed and torch.linalg.matrix_norm(safe @ inverse - eye) < _TRUSTED:
            return safe, inverse
        damping *= 2
    raise LorakitError(
        f"attach: init='corda' found no inverse of the second moment of {path}'s inputs (are they zero?)."
    )


@dataclass(frozen=True, kw_only=True)
class CorDA(Initialiser):
    """Components of the weight, ordered by what they do to the inputs seen."""

    name = "corda"
    needs = "inputs"
    shifts = True
    mode: Literal["instruction", "knowledge"] = option(
        "instruction",
        "what trains: the parts that the samples use most (instruction), or least, to keep what they need (knowledge)",
    )
    damping: float = option(
        0.01, "share of the mean diagonal added to the second moment, doubled until its inverse is good", above=0
    )
    examples: int = option(256, "training examples that a run measures on", minimum=1)

    def statistic(self, shape: Shape, rank: int) -> SecondMoment:
        return SecondMoment()

    def numbers(self, shape: Shape, rank: int) -> int:
        return shape.in_ * shape.in_

    def factors(self, start: Start) -> Factors:
        # In double: C⁻¹ undoes C only as far as its conditioning allows, and the last components are the first to go.
        C, inverse = damped(start.statistic.mean().double(), self.damping, start.path)
        U, S, Vh = torch.linalg.svd(start.W.double() @ C, full_matrices=False)
        part = slice(None, start.rank) if self.mode == "instruction" else slice(len(S) - start.rank, None)
        root = S[part].sqrt() / start.root_scale(self.name)
        return Factors(U[:, part] * root, root[:, None] * (Vh[part] @ inverse))
