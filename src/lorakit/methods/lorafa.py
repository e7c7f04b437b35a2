"""LoRA-FA: LoRA with A frozen at its random start, so that the backward needs x Aᵀ and never x.

    ΔW = s B A, only B trains          Zhang et al. 2023, arXiv 2308.03303

The saving is in activations: rank-wide tensors are kept instead of input-wide ones. The later version corrects B's
gradient by (A Aᵀ)⁻¹ (`corrected`, `optim/correction.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.methods.lora import LoRADelta, LoRAOptions


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRAOptions):
    """The options of LoRA; A stays frozen."""

    name = "lora-fa"
    card = Card(
        title="LoRA-FA",
        formula="ΔW = s B A, A frozen",
        parameters=lambda shape, spec: spec.rank * (shape.in_ if shape.lookup else shape.out),
        paper="arXiv 2308.03303",
        use="When activations fill the memory: nothing as wide as the input is kept.",
    )

    corrected: bool = option(False, "give the optimiser the step of B that is nearest to a step of the whole weight")


class LoRAFADelta(LoRADelta, of=LoRAFA):
    """LoRA's tensors, of which the random one never trains (B for an embedding, where A starts at zero)."""

    def frozen(self) -> list[nn.Parameter]:
        return [self.B if self.shape.lookup else self.A]
