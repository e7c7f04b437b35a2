"""The singular values of a low-rank product from its factors, and the best product of a smaller rank.

`B A` with B (out, rank) and A (rank, in) has the singular values of the small matrix R_B R_Aᵀ of two QR factorisations,
so that nothing as large as (out, in) is ever made. All is done in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.errors import LorakitError

OVERSAMPLING = 16
"""Directions tried beyond those asked for; without any the last ones are poor."""


@dataclass(frozen=True)
class Spectrum:
    """The thin singular value decomposition of a matrix: U (out, k), values (k,) falling, Vh (k, in)."""

    U: Tensor
    values: Tensor
    Vh: Tensor

    def rank_for(self, energy: float) -> int:
        """The smallest rank that holds this share of the sum of squared singular values; 1 for a zero matrix."""
        squares = self.values.square()
        wanted = energy * squares.sum() * (1 - 1e-12)
        return min(int((squares.cumsum(0) < wanted).sum()) + 1, len(squares))

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """`(B, A)` of the best approximation of this rank, the singular values shared evenly between them."""
        root = self.values[:rank].sqrt()
        return self.U[:, :rank] * root, root[:, None] * self.Vh[:rank]

    def lost(self, rank: int) -> float:
        """The Frobenius norm of what the cut at this rank leaves out."""
        return float(torch.linalg.vector_norm(self.values[rank:]))


def spectrum(B: Tensor, A: Tensor) -> Spectrum:
    """The singular value decomposition of `B A`, with as many values as the rank or the smaller side has."""
    left, right = torch.linalg.qr(B.detach().double()), torch.linalg.qr(A.detach().double().T)
    U, values, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return Spectrum(left.Q @ U, values, Vh @ right.Q.T)


def spectrum_of(M: Tensor) -> Spectrum:
    """The singular value decomposition of a matrix that has no factors."""
    return Spectrum(*torch.linalg.svd(M.detach().double(), full_matrices=False))


def triplets(
    M: Tensor, count: int, iterations: int | None = None, tries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a matrix: U (out, count), S (count,), V (in, count).

    Args:
        M: (out, in), float32 or better.
        count: how many.
        iterations: None for the exact decomposition; else subspace iterations of a random projection.
        tries: width of that projection; by default `count` and some more.
    """
    if iterations is None:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[:, :count], S[:count], Vh[:count].mT
    width = min(tries or count + OVERSAMPLING, *M.shape)
    U, S, V = torch.svd_lowrank(M, q=width, niter=iterations)
    return U[:, :count], S[:count], V[:, :count]


def norm(B: Tensor, A: Tensor) -> float:
    """The Frobenius norm of `B A`."""
    B, A = B.detach().double(), A.detach().double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def distance(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> float:
    """The Frobenius norm of the difference of two products."""
    return norm(torch.cat([B, -other_B.to(B)], dim=1), torch.cat([A, other_A.to(A)]))


def check_request(rank: int | None, energy: float | None, verb: str = "resize", needed: bool = True) -> None:
    """Raise LorakitError unless one of a rank and an energy share was asked for (or none, if not `needed`), in its range."""
    if (rank is None) == (energy is None) and (needed or rank is not None):
        raise LorakitError(f"{verb}: give either a rank or an energy share.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise LorakitError(f"{verb}: rank was given as {rank!r}; it is an integer of at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise LorakitError(f"{verb}: energy was given as {energy!r}; it is a share above 0 and at most 1.")
