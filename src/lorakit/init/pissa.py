"""PiSSA and MiLoRA: the adapter starts as a part of the weight's own spectrum, which is taken off the base's side.

    W = U S Vᵀ      B = U_k √(S_k / s)      A = √(S_k / s) V_kᵀ      y = (W - s B₀ A₀ + s B A) x

PiSSA takes the principal components (the largest singular values), MiLoRA the minor ones. Meng et al. 2024,
arXiv 2404.02948; Wang et al. 2024, arXiv 2406.09044. Keep dropout and weight decay at 0: the adapter holds a part of the
model, and both would pull at it. alpha = rank (s = 1) is what the papers use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.core.options import option
from lorakit.core.spectrum import triplets
from lorakit.init.initialiser import Factors, Initialiser, Start


@dataclass(frozen=True, kw_only=True)
class PiSSA(Initialiser):
    """The principal components of the weight."""

    name = "pissa"
    needs = "weight"
    shifts = True
    iterations: int | None = option(
        None,
        "subspace iterations of a fast decomposition (4 is enough to train from); null for an exact one",
        minimum=0,
    )

    def factors(self, start: Start) -> Factors:
        U, S, V = triplets(start.W, start.rank, self.iterations)
        root = S.sqrt() / start.root_scale(self.name)
        return Factors(U * root, (V * root).mT)


@dataclass(frozen=True, kw_only=True)
class MiLoRA(Initialiser):
    """The minor components of the weight, so that what the model knows best is left alone."""

    name = "milora"
    needs = "weight"
    shifts = True

    def factors(self, start: Start) -> Factors:
        U, S, Vh = torch.linalg.svd(start.W, full_matrices=False)
        root = S[-start.rank :].sqrt() / start.root_scale(self.name)
        return Factors(U[:, -start.rank :] * root, root[:, None] * Vh[-start.rank :])
