"""PVeRA: VeRA whose middle is a random variable in training, and its mean afterwards.

    (μ, log σ²) = λ_d ⊙ A x, y += λ_b ⊙ B (μ + σ ε), ε ~ N(0, 1)          ΔW = diag(λ_b) B diag(λ_d[: rank]) A[: rank]

A (2 rank, widest in) and B (widest out, rank) are VeRA's frozen pair with A twice as tall; λ_d (2 rank) and λ_b (out) train.
The noise is a regulariser: what is evaluated, merged and served is the mean. It is drawn in layers that meet their inputs as
they are (linear ones); convolutions and embeddings train by the mean. arXiv 2512.07703.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import dropout_option
from lorakit.methods.vera import OverPair, VeRA, kaiming


@dataclass(frozen=True, kw_only=True)
class PVeRA(VeRA):
    """The options of PVeRA."""

    name = "pvera"
    card = Card(
        title="PVeRA",
        formula="ΔW = diag(λ_b) B diag(λ_d) A; in training the middle is drawn around it",
        parameters=lambda shape, spec: shape.out + 2 * spec.rank,
        paper="arXiv 2512.07703",
        use="As VeRA, where there is little data to train on.",
    )

    dropout: float = dropout_option("pvera_dropout")
    sample: bool = option(True, "draw the middle in training; else its mean is taken there too")


class PVeRADelta(OverPair, of=PVeRA):
    """λ_b and λ_d of one matrix; A and B are the pool's."""

    spec: PVeRA

    def __init__(self, spec: PVeRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.lambda_b = nn.Parameter(torch.zeros(shape.out))
        self.lambda_d = nn.Parameter(torch.full((2 * spec.rank,), spec.d_initial))
        self.projections()

    def draw(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """(widest out, rank) and (2 rank, widest in), A first."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        A = kaiming((2 * self.spec.rank, in_), generator)
        return kaiming((out, self.spec.rank), generator), A

    def both(self) -> tuple[Tensor, Tensor]:
        """B with its gains (out, rank), and A (2 rank, in)."""
        B, A = self.projections()
        own = self.lambda_b
        return own[:, None] * B[: self.shape.out].to(own), A[:, : self.shape.in_].to(own)

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.both()
        return B, A[: self.spec.rank]

    def gate(self) -> Tensor:
        return self.lambda_d[: self.spec.rank]

    @property
    def draws(self) -> bool:
        """Whether the middle is drawn just now."""
        return self.training and self.spec.sample

    def drawn(self, x: Tensor) -> Tensor:
        """What the change gives for inputs (..., in) with a middle that is drawn."""
        B, A = (M.to(x.dtype) for M in self.both())
        mean, log = (self.lambda_d.to(x.dtype) * F.linear(F.dropout(x, self.dropout), A)).chunk(2, dim=-1)
        return F.linear(mean + (log / 2).exp() * torch.randn_like(log), B)

    def act(self, call: Call) -> Tensor:
        return call.through(self.drawn, lambda: self.dense(call.W)) if self.draws else super().act(call)

    def output(self, call: Call) -> Tensor | None:
        return None if self.draws else super().output(call)
