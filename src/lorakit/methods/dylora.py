"""DyLoRA: one training, an adapter that is usable at every rank.

    ΔW = (alpha / b) B[:, :b] A[:b]          A (rank, in), B (out, rank), 1 ≤ b ≤ rank

Each training step draws one b for the whole model (`train/schedules.py`) and trains the leading b rows of A and columns
of B, so that what matters most comes first. Afterwards any b is a plain LoRA: `lorakit resize --rank b --own`. The scale
is alpha / b in training and in use; with alpha / rank a cut adapter would be too weak by b / rank. Components that are
not drawn do not move, neither by momentum nor by weight decay. Valipour et al. 2022, arXiv 2210.07558; on a 4-bit base
QDyLoRA, arXiv 2402.10462.

A 576 → 1536 layer at rank 16 trains 16 · (576 + 1536) = 33,792 numbers. In PEFT's files it is the plain LoRA of the full
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lorakit.core.delta import Card, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.lora import LoRAOptions, TwoFactors


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LoRAOptions):
    """The options of LoRA, and which ranks are drawn."""

    name = "dylora"
    schedule = "draw"
    card = Card(
        title="DyLoRA",
        formula="ΔW = (alpha / b) B[:, :b] A[:b], b drawn at each step",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_),
        paper="arXiv 2210.07558; QDyLoRA arXiv 2402.10462",
        use="When the right rank is not known, or one adapter must serve at several sizes.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    smallest: int = option(1, "smallest rank that is drawn; the largest is rank", minimum=1)
    frozen: bool = option(False, "train only the last of the drawn components, not those before it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest > self.rank:
            raise LorakitError(
                f"dylora: smallest was given as {self.smallest}; it is a rank from 1 to rank={self.rank}."
            )


class DyLoRADelta(TwoFactors, of=DyLoRA):
    """A and B of one matrix, of which the leading `b` components act."""

    def __init__(self, spec: DyLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.drawn: int | None = None
        """The rank of the training step, set by the schedule; all components act while it is None or in evaluation."""

    @property
    def b(self) -> int:
        """How many components act."""
        rank = self.A.shape[0]
        return min(self.drawn, rank) if self.drawn is not None and self.training else rank

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self._scale_at(self.b)

    def _scale_at(self, b: int) -> float:
        spec = cast(DyLoRA, self.spec)
        return spec.alpha / spec.divisor(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        b = self.b
        if b == self.A.shape[0] and self.drawn is None:
            return self.B, self.A
        if cast(DyLoRA, self.spec).frozen and self.training and self.drawn is not None:
            B = torch.cat([self.B[:, : b - 1].detach(), self.B[:, b - 1 : b]], dim=1)
            return B, torch.cat([self.A[: b - 1].detach(), self.A[b - 1 : b]])
        return self.B[:, :b], self.A[:b]

    def trained(self) -> slice:
        """The components that the step of this draw trains."""
        return slice(self.b - 1 if cast(DyLoRA, self.spec).frozen else 0, self.b)

    def truncated(self, rank: int) -> tuple[Tensor, Tensor] | None:
        b = min(rank, self.A.shape[0])
        return self._scale_at(b) * self.B.detach()[:, :b], self.A.detach()[:b]
