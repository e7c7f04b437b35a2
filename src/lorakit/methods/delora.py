"""DeLoRA: LoRA whose rank-one pieces have a length of their own, so that its strength cannot grow with its factors.

    ΔW = B diag(λ / (rank · ‖A_i‖ · ‖B_i‖)) A diag(w)          A (rank, in), B (out, rank), w (in,) the lengths of W's columns

Only the directions of A's rows and B's columns count; λ, one trained number, is the length of all. Norms below 1e-4 count as
that. B starts at zero. w is kept with the adapter. Bini, Girrbach and Akata 2025, arXiv 2503.18225.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.lora import Trained
from lorakit.methods.options import Bounded, dropout_option, rank_option


@dataclass(frozen=True, kw_only=True)
class DeLoRA(Bounded):
    """The options of DeLoRA."""

    name = "delora"
    card = Card(
        title="DeLoRA",
        formula="ΔW = B diag(λ / (rank ‖A_i‖ ‖B_i‖)) A diag(‖W_j‖)",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_) + 1,
        paper="arXiv 2503.18225",
        use="When long training or a high learning rate drives LoRA away from the base.",
    )

    rank: int = rank_option(8)
    strength: float = option(15.0, "where λ starts", above=0, peft="delora_lambda", pattern="lambda_pattern")
    dropout: float = dropout_option("module_dropout")


class DeLoRADelta(Trained, LowRank, of=DeLoRA):
    """A, B and λ of one matrix, and the lengths of the weight's columns."""

    def __init__(self, spec: DeLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.lam = nn.Parameter(torch.full((1,), float(spec.strength)))
        self.register_buffer("w", torch.ones(shape.in_))
        self.w: Tensor

    def begin(self, W: Tensor) -> None:
        self.w.copy_(torch.linalg.vector_norm(W.detach().to(self.w.dtype), dim=0))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A * self.w

    def gate(self) -> Tensor:
        A, B = (torch.linalg.vector_norm(M, dim=axis).clamp_min(1e-4) for M, axis in ((self.A, 1), (self.B, 0)))
        gate: Tensor = self.lam / (self.A.shape[0] * A * B)
        return gate
