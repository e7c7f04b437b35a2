"""Options that several methods have, each declared once, and what a rank must fit."""

from __future__ import annotations

import math
from typing import Any, Self

from lorakit.core.delta import Method, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError


def rank_option(default: int, doc: str = "rank of the update: columns of B, rows of A", **declared: Any) -> Any:
    """A rank, which may differ per layer unless `pattern` is None."""
    return option(default, doc, minimum=1, **{"peft": "r", "pattern": "rank_pattern", **declared})


def alpha_option(default: float, doc: str = "numerator of the scale, alpha / rank", **declared: Any) -> Any:
    """The numerator of the scale, which may differ per layer unless `pattern` is None."""
    return option(default, doc, **{"peft": "lora_alpha", "pattern": "alpha_pattern", **declared})


def dropout_option(
    peft: str = "lora_dropout", doc: str = "probability with which an input of A is zeroed in training"
) -> Any:
    """Dropout, none by default."""
    return option(0.0, doc, minimum=0, below=1, peft=peft)


class Scaled(Method):
    """A method with a rank and a scale that is alpha over it."""

    rank: int
    alpha: float

    def divisor(self, rank: int) -> float:
        """What alpha is divided by at a rank."""
        return rank

    @property
    def scale(self) -> float:
        """The constant s of its formula."""
        return self.alpha / self.divisor(self.rank)

    def resized(self, rank: int) -> Self:
        return self.replace(rank=rank, alpha=self.alpha * self.divisor(rank) / self.divisor(self.rank))


def steps_option(default: int | float, doc: str, **declared: Any) -> Any:
    """A number of steps: a count, or a share of the run below 1 (see `share_of`)."""
    shown = "a count of steps, or a share of the run below 1"
    return option(default, doc, allows=lambda given: isinstance(given, int) or given < 1, shown=shown, **declared)


def share_of(steps: int | float, total: int) -> int:
    """A number of steps from a count or a share of the run below 1."""
    return math.floor(steps * total) if isinstance(steps, float) and steps < 1 else int(steps)


def check_rank_fits(rank: int, shape: Shape, path: str, why: str = "") -> None:
    """LorakitError where the rank is above that of any matrix of this shape; `why` says what is wrong with it there."""
    smaller = min(shape.out, shape.in_)
    if rank > smaller:
        raise LorakitError(
            f"attach: rank {rank} exceeds the maximum useful rank of {path} ({shape.out} × {shape.in_}), {smaller}{why}. "
            f"Give it less by rank_pattern={{{path!r}: {smaller}}}, or leave the layer out."
        )
