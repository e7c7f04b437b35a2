"""Random starts: one factor random, the other zero, so that the model begins as its base.

For an embedding the roles swap: the factor that meets the one-hot input is zero, since a random one would be a random
change of every token that was never trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.delta import LowRank
from lorakit.init.initialiser import Initialiser


def _start(delta: LowRank, B: Tensor, A: Tensor, std: float | None) -> tuple[Tensor, Tensor]:
    """A random and B zero; the reverse for lookups. `std` None: uniform within 1/√in (Kaiming with a = √5)."""
    random, zero = (B, A) if delta.shape.lookup else (A, B)
    if delta.shape.lookup:
        values = torch.randn_like(random) * (1.0 if std is None else std)
    elif std is None:
        values = torch.empty_like(random).uniform_(-1.0, 1.0) / math.sqrt(delta.shape.in_)
    else:
        values = torch.randn_like(random) * std
    return (values, torch.zeros_like(zero)) if delta.shape.lookup else (torch.zeros_like(zero), values)


@dataclass(frozen=True, kw_only=True)
class Kaiming(Initialiser):
    """loralib's start: A uniform within ±1/√in, variance 1 / (3 in)."""

    name: ClassVar[str] = "kaiming"

    def factors(self, delta: LowRank, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return _start(delta, B, A, None)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Initialiser):
    """PEFT's "gaussian": A normal with standard deviation 1 / rank."""

    name: ClassVar[str] = "gaussian"

    def factors(self, delta: LowRank, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return _start(delta, B, A, 1.0 / A.shape[0])


@dataclass(frozen=True, kw_only=True)
class Normal(Initialiser):
    """The LoRA paper's start: A normal; the paper does not give σ, so it is an option."""

    name: ClassVar[str] = "normal"
    std: float = 0.02

    def factors(self, delta: LowRank, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return _start(delta, B, A, self.std)
