"""What an adapter adds to one matrix, whatever its method: a product of thin factors where it has them, else ΔW whole.

All is in float64 and has every scale within. What can be said of a product from its factors (sums, norms, inner products,
singular values) is computed from them, so that nothing as large as the layer is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core.spectrum import Spectrum, spectrum, spectrum_of


@dataclass(frozen=True)
class Change:
    """ΔW (out, in) of one matrix: `B A` with B (out, rank) and A (rank, in); with no A it is B, which is (out, in) then."""

    B: Tensor
    A: Tensor | None = None

    @classmethod
    def of(cls, B: Tensor, A: Tensor | None = None) -> Change:
        """From tensors of any precision."""
        return cls(B.detach().double(), None if A is None else A.detach().double())

    @property
    def rank(self) -> int | None:
        """The columns of B; None where ΔW has no factors."""
        return None if self.A is None else self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.B.shape[0], (self.B if self.A is None else self.A).shape[1]

    def dense(self) -> Tensor:
        """ΔW as a matrix (out, in)."""
        return self.B if self.A is None else self.B @ self.A

    def scaled(self, factor: float) -> Change:
        """`factor · ΔW`."""
        return Change(factor * self.B, self.A)

    def norm(self) -> float:
        """‖ΔW‖ in the Frobenius norm."""
        return math.sqrt(max(0.0, inner(self, self)))

    def spectrum(self) -> Spectrum:
        """The singular value decomposition of ΔW, with as many values as the rank or the smaller side has."""
        return spectrum_of(self.B) if self.A is None else spectrum(self.B, self.A)

    def thin(self) -> Change:
        """The same ΔW by factors of no more columns than a matrix of this shape has rank."""
        if self.rank is None or self.rank <= min(self.shape):
            return self
        found = self.spectrum()
        return Change(*found.cut(len(found.values)))


def total(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """`Σ weight · ΔW`: the factors side by side where all have some, which is exact at the sum of the ranks."""
    weighted = [change.scaled(weight) for change, weight in zip(changes, weights, strict=True)]
    factors: Any = [change.A for change in weighted]
    if all(A is not None for A in factors):
        return Change(torch.cat([change.B for change in weighted], dim=1), torch.cat(factors))
    result = weighted[0].dense()
    for change in weighted[1:]:
        result = result + change.dense()
    return Change(result)


@dataclass(frozen=True)
class Cut:
    """What became of one matrix: its new change, the norm of what was asked for, and of what the change lacks of it."""

    change: Change
    size: float
    lost: float = 0.0

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm."""
        return self.lost / self.size if self.size else 0.0


def cut(change: Change, rank: int | None = None, energy: float | None = None) -> Cut:
    """The best approximation at a rank, or at the least rank that keeps this share of the squared singular values."""
    found = change.spectrum()
    wanted = min(rank, len(found.values)) if rank is not None else found.rank_for(1.0 if energy is None else energy)
    return Cut(Change(*found.cut(wanted)), float(torch.linalg.vector_norm(found.values)), found.lost(wanted))


def kept(change: Change) -> Cut:
    """The change as it is, by thin factors where it has some."""
    return Cut(change.thin(), change.norm())


def inner(one: Change, other: Change) -> float:
    """⟨ΔW, ΔW'⟩: the sum over all entries of their products."""
    if one.A is not None and other.A is not None:
        return float(((one.B.T @ other.B) * (one.A @ other.A.T)).sum())
    if one.A is not None:
        one, other = other, one
    return float((one.B * other.B if other.A is None else (one.B @ other.A.T) * other.B).sum())


def distance(one: Change, other: Change) -> float:
    """‖ΔW - ΔW'‖ in the Frobenius norm."""
    return total([one, other], [1.0, -1.0]).norm()
