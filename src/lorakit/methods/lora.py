"""LoRA: a frozen weight, and beside it a trained product of two thin matrices.

    y = W x + b + s B A drop(x)          A (rank, in), B (out, rank), s = alpha / rank, or alpha / √rank (rsLoRA)

B starts at zero, so training starts from the base model. For an embedding the factor that meets the one-hot input is
the zero one. One running example: a 576 → 1536 layer at rank 16 trains 16 · (576 + 1536) = 33,792 numbers instead of
884,736. Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Form, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import Bounded, Scaled, alpha_option, dropout_option, rank_option


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(Bounded, Scaled):
    """The options that LoRA and its nearest kin share."""

    rank: int = rank_option(16, peft_default=8)
    alpha: float = alpha_option(
        16.0, "numerator of the scale, alpha / rank; keep it when you change the rank", peft_default=8
    )
    dropout: float = dropout_option()
    rslora: bool = option(False, "scale by alpha / √rank, which stays stable at large ranks", peft="use_rslora")

    def divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rslora else rank


@dataclass(frozen=True, kw_only=True)
class LoRA(LoRAOptions):
    """Low-rank adaptation, Hu et al. 2021."""

    name = "lora"
    card = Card(
        title="LoRA",
        formula="ΔW = s B A, s = alpha / rank (rsLoRA: alpha / √rank)",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_) + shape.out * spec.lora_bias,
        paper="arXiv 2106.09685; rsLoRA arXiv 2312.03732",
        use="The default: cheap, merges exactly, every server reads it.",
    )

    lora_bias: bool = option(False, "a bias trained beside B: s b is added to the layer's bias", peft="lora_bias")

    def check(self, shape: Shape, path: str) -> None:
        super().check(shape, path)
        if self.lora_bias and shape.lookup:
            raise LorakitError(
                f"attach: lora_bias=True adds a bias, and {path} is an embedding, which has no place for one. Leave it out of "
                "the target modules, or give it an adapter of its own."
            )

    def build(self, shape: Shape, pool: Pool) -> Delta:
        return (BiasedDelta if self.lora_bias else LoRADelta)(self, shape, pool)


class Trained(Delta):
    """The family that trains A (rank, in) and B (out, rank) of one matrix, the product zero at the start."""

    def __init__(self, spec: Any, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        B, A = start_factors(shape, spec.rank)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def roles(self) -> dict[str, str]:
        # the factor that starts at zero is B, for an embedding A
        return {"A": "B", "B": "A"} if self.shape.lookup else {}


class TwoFactors(Trained, LowRank):
    """Members of it that act as a product; they say in `factors` how."""

    def set_factors(self, B: Tensor, A: Tensor) -> None:
        with torch.no_grad():
            self.B.copy_(B)
            self.A.copy_(A)


class LoRADelta(TwoFactors, of=LoRA):
    """A and B of one matrix."""

    def __init__(self, spec: LoRAOptions, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A


class BiasedDelta(LoRADelta):
    """A and B of one matrix, and b (out,), which starts at zero and is scaled as their product is."""

    def __init__(self, spec: LoRAOptions, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.b = nn.Parameter(torch.zeros(shape.out))

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        return self.scale * self.b

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        return dataclasses.replace(super().form(W, b), bias=self.shift(b, lambda: W))

    def roles(self) -> dict[str, str]:
        return {**super().roles(), "b": "bias"}


def start_factors(shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    """`(B, A)` as LoRA starts: A uniform within 1/√in and B zero; for an embedding A zero and B normal."""
    if shape.lookup:
        return torch.empty(shape.out, rank).normal_(), torch.zeros(rank, shape.in_)
    bound = 1 / math.sqrt(shape.in_)
    return torch.zeros(shape.out, rank), torch.empty(rank, shape.in_).uniform_(-bound, bound)
