"""What a rank and a scale may be, for methods that have them."""

from __future__ import annotations

import math

from lorakit.core.delta import Shape
from lorakit.errors import LorakitError


def check_rank(method: str, rank: object) -> None:
    """LorakitError unless `rank` is an integer of at least 1."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LorakitError(f"{method}: rank was given as {rank!r}; it is an integer of at least 1.")


def check_scale(method: str, alpha: object) -> None:
    """LorakitError unless `alpha` is a finite number."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise LorakitError(f"{method}: alpha was given as {alpha!r}; it is a finite number.")


def check_rank_fits(rank: int, shape: Shape, path: str) -> None:
    """LorakitError where the rank is above that of any matrix of this shape."""
    smaller = min(shape.out, shape.in_)
    if rank > smaller:
        raise LorakitError(
            f"attach: rank {rank} is above the size of {path} ({shape.out} × {shape.in_}). Give it less by "
            f"rank_pattern={{{path!r}: {smaller}}}, or leave the layer out."
        )
