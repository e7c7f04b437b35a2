"""PSOFT: the weight's leading part is turned within its own rank, and what it acts on and gives is rescaled.

    ΔW = s B (R - I) A          A = V_rᵀ, B = U_r S_r / s of W ≈ U_r S_r V_rᵀ, R = diag(b) (I + Q)(I - Q)⁻¹ diag(a)

R (rank, rank) is a rotation between two trained scales: rank (rank - 1) / 2 + 2 rank numbers; s = alpha / rank. A and B are
read off the base again and are in no file: singular vectors with other signs would give another function, a limit of the
format. The decomposition is done in float32, as PEFT does it. ICLR 2026, openreview FSHrinMArK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import Bounded, Scaled, alpha_option, dropout_option, rank_option
from lorakit.methods.rotation import cayley, series, skew, within


def _numbers(spec: PSOFT) -> int:
    """Trained numbers of a matrix, whatever its size."""
    rank = spec.rank
    turn = rank * (rank - 1) // 2 if spec.orthogonal else rank * rank
    return turn + rank * (spec.scale_in + spec.scale_out)


@dataclass(frozen=True, kw_only=True)
class PSOFT(Bounded, Scaled):
    """The options of PSOFT."""

    name = "psoft"
    card = Card(
        title="PSOFT",
        formula="ΔW = U_r S_r (diag(b) R diag(a) - I) V_rᵀ, R a rotation",
        parameters=lambda shape, spec: _numbers(spec),
        paper="openreview FSHrinMArK",
        use="When OFT's care for the base is wanted at a count that does not depend on the model's width.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    rank: int = rank_option(32, "how many singular directions are turned; at least 2 for a rotation", pattern=None)
    alpha: float = alpha_option(32.0, "numerator of s, which is taken off B again", peft="psoft_alpha", pattern=None)
    dropout: float = dropout_option("psoft_dropout")
    orthogonal: bool = option(True, "whether R is a rotation; else it is any matrix", peft="psoft_orth")
    scale_in: bool = option(True, "train a, the scales before R", peft="psoft_mag_a")
    scale_out: bool = option(True, "train b, the scales behind R", peft="psoft_mag_b")
    neumann: bool = option(False, "the first terms of the inverse's series instead of it", peft="use_cayley_neumann")
    terms: int = option(
        5,
        "terms of the series",
        minimum=4,
        peft="num_cayley_neumann_terms",
        from_peft=lambda terms: 4 if terms == 3 else terms,  # PEFT's third and fourth give the same series
    )
    eps: float | None = option(
        None,
        "how large Q may be in the series; a longer one is scaled back",
        above=0,
        below=1,
        peft="cayley_neumann_eps",
    )
    split: bool = option(
        False,
        "the roots of the singular values on both sides, instead of all on B's",
        peft="ab_svd_init",
        peft_default="psoft_init",
        from_peft=lambda start: start == "pissa_init",
        to_peft=lambda split: "pissa_init" if split else "psoft_init",
    )
    svd: Literal["full", "lowrank"] = option("full", "an exact or a randomised decomposition", peft="psoft_svd")
    iterations: int = option(10, "power iterations of the randomised one", minimum=0, peft="psoft_svd_lowrank_niter")
    seed: int = option(0, "what the randomised one is drawn from", peft="random_seed")

    def check(self, shape: Shape, path: str) -> None:
        super().check(shape, path)
        if self.rank > min(shape.out, shape.in_):
            raise LorakitError(
                f"attach: psoft takes {self.rank} directions of {path}, which has {min(shape.out, shape.in_)}; lower the rank."
            )


class PSOFTDelta(LowRank, of=PSOFT):
    """Q, a and b of one matrix, and the frozen A and B, which are known once the weight is."""

    spec: PSOFT

    def __init__(self, spec: PSOFT, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        rank = spec.rank
        self.scale = spec.scale
        self.Q = nn.Parameter(torch.zeros(rank * (rank - 1) // 2) if spec.orthogonal else torch.eye(rank))
        self.a = nn.Parameter(torch.ones(rank)) if spec.scale_in else None
        self.b = nn.Parameter(torch.ones(rank)) if spec.scale_out else None
        self.register_buffer("A", torch.zeros(rank, shape.in_), persistent=False)
        self.register_buffer("B", torch.zeros(shape.out, rank), persistent=False)
        self.A: Tensor
        self.B: Tensor

    def begin(self, W: Tensor) -> None:
        spec, W = self.spec, W.detach().float()
        if spec.svd == "full":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[] if W.device.type == "cpu" else [W.device]):
                torch.manual_seed(spec.seed)
                U, S, V = torch.svd_lowrank(W, q=spec.rank, niter=spec.iterations)
            Vh = V.T
        U, S, Vh = U[:, : spec.rank], S[: spec.rank] / self.scale, Vh[: spec.rank]
        root = S.sqrt() if spec.split else torch.ones_like(S)
        self.B.copy_(U * (S / root))
        self.A.copy_(root[:, None] * Vh)

    def turn(self) -> Tensor:
        """R - I."""
        spec, eye = self.spec, torch.eye(self.spec.rank, dtype=self.Q.dtype, device=self.Q.device)
        if not spec.orthogonal:
            change = self.Q - eye
        elif spec.neumann:
            change = series(skew(within(self.Q, spec.eps), spec.rank), spec.terms)
        else:
            change = cayley(skew(self.Q, spec.rank))
        for scales, side in ((self.a, 0), (self.b, 1)):
            if scales is not None:
                along = scales.unsqueeze(side)
                change = change * along + eye * (along - 1)
        return change

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B @ self.turn(), self.A
