"""AdaLoRA: a change in the form of a singular value decomposition, whose ranks are spent where they matter.

    ΔW = s P diag(λ) Q          P (out, rank), λ (rank,), Q (rank, in), s = alpha / rank

A triplet is one column of P, one λ and one row of Q. Training starts with `rank` triplets in every layer; a schedule
(`train/schedules.py`) measures how much each matters, |w · ∂L/∂w| smoothed over steps, and lets the total fall along a
cubic curve to `target_rank` per layer on average, setting the λ of the others to zero. P and Q are kept near orthonormal
by a penalty. λ starts at zero. A 576 → 1536 layer at rank 12 trains 12 · (576 + 1536 + 1) = 25,356 numbers; what is saved
are the triplets that were kept. Zhang et al. 2023, arXiv 2303.10512.

Where the codes that are in use go wrong, this does not: exactly the budget is kept (ties are broken evenly over layers,
not all masked), a target equal to the start is allowed, weights are judged before the step with the gradient that belongs
to them, and the penalty is no part of a reported or evaluated loss. As in those codes s stays alpha / rank while ranks
fall, and the penalty is the mean over all P and Q of the norm, not of its square as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import Bounded, Scaled, alpha_option, dropout_option, rank_option, steps_option


def _count(steps: int | float) -> int:
    """What PEFT is told, which knows no shares of a run."""
    return steps if isinstance(steps, int) else 0


@dataclass(frozen=True, kw_only=True)
class TripletOptions(Bounded, Scaled):
    """The options that AdaLoRA and ElaLoRA share."""

    rank: int = rank_option(12, "triplets of every layer at the start", peft="init_r")
    alpha: float = alpha_option(
        12.0, "numerator of the scale, alpha / rank, which stays when ranks change", peft_default=8
    )
    dropout: float = dropout_option(doc="probability with which an input of Q is zeroed in training")
    warmup: int | float = steps_option(
        0.1,
        "steps before ranks begin to change: a count, or a share of the run below 1",
        minimum=0,
        peft="tinit",
        peft_default=0,
        to_peft=_count,
    )
    final: int | float = steps_option(
        0.4,
        "last steps, in which ranks stay as they are: a count, or a share of the run below 1",
        minimum=0,
        peft="tfinal",
        peft_default=0,
        to_peft=_count,
    )
    interval: int = option(10, "steps between two changes of the ranks", minimum=1, peft="deltaT", peft_default=1)
    beta1: float = option(0.85, "smoothing of the importance", minimum=0, below=1, peft="beta1")
    beta2: float = option(0.85, "smoothing of the importance's uncertainty", minimum=0, below=1, peft="beta2")
    orthogonality: float = option(
        0.1, "weight of the penalty that keeps P and Q orthonormal", minimum=0, peft="orth_reg_weight", peft_default=0.5
    )

    @property
    def final_rank(self) -> int:
        """Triplets per layer, on average, that are left at the end."""
        return self.rank


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(TripletOptions):
    """The options of AdaLoRA."""

    name = "adalora"
    schedule = "budget"
    card = Card(
        title="AdaLoRA",
        formula="ΔW = s P diag(λ) Q, s = alpha / rank; ranks fall to a budget where they matter least",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_ + 1),
        paper="arXiv 2303.10512",
        use="When layers differ in what they need and the final size is what counts.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    target_rank: int = rank_option(
        8, "triplets per layer, on average, that are left at the end", peft="target_r", pattern=None
    )

    @property
    def final_rank(self) -> int:
        return self.target_rank


class Triplets(LowRank, of=TripletOptions):
    """P, λ and Q of one matrix, and which triplets are kept.

    `kept` (rank,) says what the last allocation kept. It gates nothing: between two allocations a λ may grow again and so
    win its place back. A triplet is left out of files where it is not kept and its λ is zero, which changes nothing.
    """

    kept: Tensor

    def __init__(self, spec: TripletOptions, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        self.P = nn.Parameter(torch.randn(shape.out, spec.rank) * 0.02)
        self.lam = nn.Parameter(torch.zeros(spec.rank))
        self.Q = nn.Parameter(torch.randn(spec.rank, shape.in_) * 0.02)
        self.register_buffer("kept", torch.ones(spec.rank, dtype=torch.bool))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.P, self.Q

    def gate(self) -> Tensor | None:
        return self.lam

    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """λ takes the lengths, so that P's columns and Q's rows have length 1; a product of zero is λ = 0."""
        with torch.no_grad():
            up, down = torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1)
            self.lam.copy_(up * down)
            self.P.copy_(torch.where(up > 0, B / up.clamp_min(torch.finfo(B.dtype).tiny), self.P))
            rows = A / down.clamp_min(torch.finfo(A.dtype).tiny)[:, None]
            self.Q.copy_(torch.where(down[:, None] > 0, rows, self.Q))

    def roles(self) -> dict[str, str]:
        return {"P": "A", "Q": "A"}  # neither starts at zero

    # -- ranks that change ---------------------------------------------------------------------------------------------
    def rows(self) -> Tensor:
        """Indices of the triplets that count: kept ones and those that are not zero; at least one."""
        found = (self.kept | (self.lam.detach() != 0)).nonzero().flatten()
        return found if len(found) else torch.zeros(1, dtype=torch.long, device=self.lam.device)

    def move(self, left: Tensor, P: Tensor, Q: Tensor) -> None:
        """Keep the triplets of these indices and add new ones with λ = 0: columns of P (out, new), rows of Q (new, in).

        The parameters stay the objects that they are.
        """
        with torch.no_grad():
            self.lam.data = torch.cat([self.lam.data[left], self.lam.new_zeros(P.shape[1])])
            self.P.data = torch.cat([self.P.data[:, left], P.to(self.P)], dim=1)
            self.Q.data = torch.cat([self.Q.data[left], Q.to(self.Q)])
            self.kept = torch.ones_like(self.lam, dtype=torch.bool)
        for parameter in (self.P, self.lam, self.Q):
            parameter.grad = None
        self.spec = cast(TripletOptions, self.spec).resized(len(self.lam))

    def truncated(self, rank: int) -> tuple[Tensor, Tensor] | None:
        """The triplets of the largest |λ| ‖P_k‖ ‖Q_k‖."""
        P, Q = self.P.detach(), self.Q.detach()
        size = self.lam.detach().abs() * torch.linalg.vector_norm(P, dim=0) * torch.linalg.vector_norm(Q, dim=1)
        best = size.topk(min(rank, len(size))).indices.sort().values
        return self.scale * P[:, best] * self.lam.detach()[best], Q[best]
