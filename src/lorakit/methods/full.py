"""Full fine-tuning as a delta: every entry of the matrix trains, beside the base that stays as it was.

    ΔW = P          P (out, in), starts at zero

What it costs is what full fine-tuning costs, a second copy of the weight (in float32), its gradient and the optimiser's
state; what it gives is a change that switches, blends, merges and comes off like any other, and the measure for all
methods that save something. A 576 → 1536 layer trains 576 · 1536 = 884,736 numbers. Biases do not belong to the matrix;
attach(..., bias="lora_only") trains those too. PEFT has no such method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Full fine-tuning of the adapted matrices; it has no options."""

    name = "full"
    card = Card(
        title="Full fine-tuning",
        formula="ΔW = P, whole",
        parameters=lambda shape, spec: shape.out * shape.in_,
        paper="-",
        use="As the measure for other methods, or where memory is no question.",
    )


class FullDelta(Delta, of=Full):
    """P of one matrix."""

    def __init__(self, spec: Full, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.P = nn.Parameter(torch.zeros(shape.out, shape.in_))

    def dense(self, W: Tensor) -> Tensor:
        return self.P
