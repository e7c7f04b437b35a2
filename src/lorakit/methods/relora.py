"""ReLoRA: several low-rank trainings one after the other, whose sum has a high rank.

    ΔW = s (B A + B₁ A₁ + … + B_k A_k)          A (rank, in), B (out, rank), s = alpha / rank

Every so many steps (`train/schedules.py`) the product so far is put aside, A and B start anew, their optimiser state is
forgotten and the learning rate rises again from zero. Only B and A train: for a 576 → 1536 layer at rank 16,
16 · (576 + 1536) = 33,792 numbers, while ΔW gets a rank of up to 16 (k + 1). Lialin et al. 2023, arXiv 2307.05695.

The paper adds the product to the base weight. Here the base is never written, so that it stays the model other adapters
know: what is put aside is kept as frozen factors beside A and B. That is exact, saves as a plain LoRA of rank (k + 1) rank,
and per token costs rank · (out + in) multiplications for each restart; a dense ΔW would cost out · in at once, which for
this layer is more up to 25 restarts. Measured on one CPU thread, forward and backward of this layer for 512 tokens: 19 ms
before any restart, 27 ms after 5, 36 ms after 10, 41 ms after 20; with a dense ΔW beside the base 41 ms. Beyond
min(out, in) the kept factors are brought back to that rank by a thin singular value decomposition, which loses nothing
but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.delta import Card, Pool, Shape
from lorakit.core.options import option
from lorakit.core.spectrum import spectrum
from lorakit.errors import LorakitError
from lorakit.methods.lora import LoRAOptions, TwoFactors
from lorakit.methods.options import steps_option


@dataclass(frozen=True, kw_only=True)
class ReLoRA(LoRAOptions):
    """The options of LoRA, and when it restarts."""

    name = "relora"
    schedule = "restart"
    card = Card(
        title="ReLoRA",
        formula="ΔW = s (B A + Σ B_k A_k), the B_k A_k frozen products of earlier stretches",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_),
        paper="arXiv 2307.05695",
        use="Long runs that need more rank than memory for trained numbers and their moments allows.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    every: int | float = steps_option(
        0.25, "steps between two restarts: a count, or a share of the run below 1", above=0
    )
    rewarm: int = option(10, "steps in which the learning rate rises from zero after a restart", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise LorakitError(
                f"relora: dropout was given as {self.dropout}; it would also act on what earlier stretches have learnt. "
                "Use dropout=0."
            )


class ReLoRADelta(TwoFactors, of=ReLoRA):
    """A and B of one matrix, and the frozen factors of earlier stretches: `B_kept` (out, k), `A_kept` (k, in)."""

    A_kept: Tensor
    B_kept: Tensor

    def __init__(self, spec: ReLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        self.register_buffer("A_kept", torch.empty(0, shape.in_))
        self.register_buffer("B_kept", torch.empty(shape.out, 0))

    def kept(self) -> tuple[Tensor, Tensor]:
        """`(B, A)` of what was put aside."""
        return self.B_kept, self.A_kept

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.kept()
        if not A.shape[0]:
            return self.B, self.A
        return torch.cat([self.B, B], dim=1), torch.cat([self.A, A])

    def restart(self, B: Tensor, A: Tensor) -> None:
        """Put the product so far aside and go on from these factors, whose product is zero."""
        with torch.no_grad():
            kept_B, kept_A = (factor.detach().clone() for factor in self.factors())
            smaller = min(self.shape.out, self.shape.in_)
            if kept_A.shape[0] > smaller:
                kept_B, kept_A = spectrum(kept_B, kept_A).cut(smaller)
            self.B_kept, self.A_kept = kept_B.to(self.B), kept_A.to(self.A)
            self.B.copy_(B)
            self.A.copy_(A)

    def hold(self, rank: int) -> None:
        """Make room for frozen factors of this rank, to be filled from a checkpoint."""
        self.B_kept, self.A_kept = self.B.new_zeros(self.shape.out, rank), self.A.new_zeros(rank, self.shape.in_)
