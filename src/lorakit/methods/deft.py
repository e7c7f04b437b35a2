"""DEFT: what the weight has in a trained direction is taken out, and something trained put in its place.

    ΔW = P (s R - K W)          P (out, rank), R (rank, in); K = relu(P)ᵀ, or with "qr" P is Q of P = Q T, and K = Qᵀ

R starts at K W / s, so that a new adapter changes nothing; with `para` there is no R, W is only reduced, and a new adapter does
change the model. s = alpha / rank, or 1. PEFT 0.21's "DEFT".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.fromweight import FromWeight
from lorakit.methods.options import Bounded, dropout_option, rank_option


@dataclass(frozen=True, kw_only=True)
class DEFT(Bounded):
    """The options of DEFT."""

    name = "deft"
    card = Card(
        title="DEFT",
        formula="ΔW = P (s R - relu(P)ᵀ W)",
        parameters=lambda shape, spec: spec.rank * (shape.out + (0 if spec.para else shape.in_)),
        paper="PEFT 0.21",
        use="When something that the base does should go, and not only be drowned out.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    rank: int = rank_option(8, pattern=None)
    alpha: float | None = option(
        None, "numerator of the scale of R, alpha / rank; without it the scale is 1", peft="alpha"
    )
    decomposition: Literal["relu", "qr"] = option("relu", "how K follows from P", peft="decomposition_method")
    para: bool = option(False, "take out and put nothing in", peft="para")
    dropout: float = dropout_option("deft_dropout", "probability with which an input of R is zeroed in training")

    @property
    def identity(self) -> bool:
        return not self.para

    @property
    def scale(self) -> float:
        """s"""
        return self.alpha / self.rank if self.alpha else 1.0


class DEFTDelta(FromWeight, of=DEFT):
    """P and R of one matrix."""

    spec: DEFT

    def __init__(self, spec: DEFT, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.P = nn.Parameter(torch.randn(shape.out, spec.rank) * 0.02)
        self.R = None if spec.para else nn.Parameter(torch.zeros(spec.rank, shape.in_))

    def begin(self, W: Tensor) -> None:
        if self.R is not None:
            with torch.no_grad():
                self.R.copy_(self.sides()[1] @ W.to(self.P) / self.spec.scale)

    def sides(self) -> tuple[Tensor, Tensor]:
        """P and K."""
        if self.spec.decomposition == "relu":
            return self.P, F.relu(self.P).T
        Q = torch.linalg.qr(self.P.to(torch.promote_types(self.P.dtype, torch.float32))).Q.to(self.P)
        return Q, Q.T

    def factors_of(self, W: Tensor) -> tuple[Tensor, Tensor]:
        P, K = self.sides()
        return P, (0 if self.R is None else self.spec.scale * self.R) - K @ W.to(K)

    def act(self, call: Call) -> Tensor:
        if not (self.training and self.dropout) or self.R is None:
            return super().act(call)
        P, K = self.sides()  # only what is put in sees dropped inputs
        return call.product(P, -K @ call.W.to(K)) + call.product(P, self.R, None, self.spec.scale, self.dropout)
