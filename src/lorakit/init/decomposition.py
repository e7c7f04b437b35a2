"""Singular triplets of a matrix, exactly or fast."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Directions tried beyond those asked for; without any the last ones are poor."""


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
