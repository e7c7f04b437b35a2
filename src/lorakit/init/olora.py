"""OLoRA: B starts orthonormal, A as what it makes of the weight.

    W = Q R (reduced, no pivoting)      B = Q[:, :r]      A = R[:r]      y = (W - s B₀ A₀ + s B A) x

Büyükakyüz 2024, arXiv 2406.01775. Cheap, one QR. The columns of B span the first r columns of W, which is an arbitrary
subspace and not a principal one; A is as large as W's columns while B is orthonormal, so their gradients differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.init.initialiser import Factors, Initialiser, Start


@dataclass(frozen=True, kw_only=True)
class OLoRA(Initialiser):
    """The first columns of the weight's QR decomposition."""

    name = "olora"
    needs = "weight"
    shifts = True

    def factors(self, start: Start) -> Factors:
        Q, R = torch.linalg.qr(start.W)
        return Factors(Q[:, : start.rank], R[: start.rank])
