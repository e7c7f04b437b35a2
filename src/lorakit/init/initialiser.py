"""The contract of an initialiser, and the one that leaves a delta as its method made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorakit.delta import Delta, LowRank
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class Initialiser(ABC):
    """Initial values for low-rank deltas; subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]

    @abstractmethod
    def factors(self, delta: LowRank, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """New `(B, A)` in place of the ones the delta has; the shapes stay."""

    def begin(self, delta: Delta) -> None:
        """Give a delta its initial values."""
        low_rank = delta.low_rank()
        if low_rank is None:
            raise LorakitError(
                f"attach: {delta.spec.name} has no low-rank factors, so init={self.name!r} cannot set it; "
                'init="default" is the method\'s own start.'
            )
        B, A = low_rank.factors()
        low_rank.set_factors(*self.factors(low_rank, B.detach(), A.detach()))


@dataclass(frozen=True, kw_only=True)
class Default(Initialiser):
    """The initial values that the method's paper gives."""

    name: ClassVar[str] = "default"

    def factors(self, delta: LowRank, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return B, A

    def begin(self, delta: Delta) -> None:
        return None
