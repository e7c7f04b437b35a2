"""1LoRA: the sum of all inputs, times one trained vector.

    y = W x + b + v · Σ_j x_j          ΔW = v 1ᵀ, every column is v (out), which starts at zero

One number per output feature, the least of all methods that see the input. The sum grows with the layer's width and with
the mean of its inputs: after a GELU or ReLU it carries much, after a LayerNorm with even gains it is near zero and the
adapter is dead. On an embedding the inputs are one-hot, so v is merely added to every row; on a convolution the sum
runs over channels and kernel. 1LoRA 2025, arXiv 2503.08333 (which does not state v's start; zero leaves the model as it is).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape


@dataclass(frozen=True, kw_only=True)
class OneLoRA(Method):
    """1LoRA has no options."""

    name = "1lora"
    card = Card(
        title="1LoRA",
        formula="ΔW = v 1ᵀ",
        parameters=lambda shape, spec: shape.out,
        paper="arXiv 2503.08333",
        use="When every number counts; put it on all linear layers, as the paper does.",
    )


class OneLoRADelta(LowRank, of=OneLoRA):
    """v of one matrix."""

    def __init__(self, spec: OneLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.v = nn.Parameter(torch.zeros(shape.out))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.v[:, None], self.v.new_ones(1, self.shape.in_)
