"""Random starts: one factor random, the other zero, so that the model begins as its base.

For an embedding the roles swap: the factor that meets the one-hot input is zero, since a random one would be a random
change of every token that was never trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.init.initialiser import Factors, Initialiser, Start


def _start(start: Start, std: float | None) -> Factors:
    """A random and B zero; the reverse for lookups. `std` None: uniform within 1/√in (Kaiming with a = √5)."""
    B, A = start.zeros(start.shape.out, start.rank), start.zeros(start.rank, start.shape.in_)
    if start.shape.lookup:
        return Factors(B.normal_(std=1.0 if std is None else std), A)
    if std is None:
        bound = 1.0 / math.sqrt(start.shape.in_)
        return Factors(B, A.uniform_(-bound, bound))
    return Factors(B, A.normal_(std=std))


@dataclass(frozen=True, kw_only=True)
class Kaiming(Initialiser):
    """loralib's start: A uniform within ±1/√in, variance 1 / (3 in)."""

    name = "kaiming"

    def factors(self, start: Start) -> Factors:
        return _start(start, None)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Initialiser):
    """PEFT's "gaussian": A normal with standard deviation 1 / rank; lookups start as by default, from a standard normal."""

    name = "gaussian"

    def factors(self, start: Start) -> Factors:
        return _start(start, None if start.shape.lookup else 1.0 / start.rank)


@dataclass(frozen=True, kw_only=True)
class Normal(Initialiser):
    """The LoRA paper's start: A normal; the paper does not give σ, so it is an option."""

    name = "normal"
    std: float = option(0.02, "standard deviation of A's entries", above=0)

    def factors(self, start: Start) -> Factors:
        return _start(start, self.std)


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Initialiser):
    """B A = 0 with neither factor zero, so that both learn from the first step.

    The columns of B and the rows of A are random combinations of two orthogonal halves of rank space: with Q orthogonal
    (rank × rank), B = M Q_even, A = (N Q_odd)ᵀ, hence B A = M Q_even Q_oddᵀ Nᵀ = 0 up to rounding.
    """

    name = "orthogonal"
    std: float = option(0.1, "standard deviation of the entries of M and N", above=0)

    def factors(self, start: Start) -> Factors:
        if start.rank % 2:
            raise LorakitError(
                f"attach: init='orthogonal' halves rank space, and {start.path} has rank {start.rank}; give an even rank."
            )
        Q: Tensor = torch.linalg.qr(start.zeros(start.rank, start.rank).normal_())[0]
        half = start.rank // 2
        M = start.zeros(start.shape.out, half).normal_(std=self.std)
        N = start.zeros(start.shape.in_, half).normal_(std=self.std)
        return Factors(M @ Q[0::2], (N @ Q[1::2]).T)
