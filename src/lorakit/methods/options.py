"""Options that several methods have, each declared once, and what a rank must fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor

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


def tucker_option() -> Any:
    """Whether a convolution's kernel is factored too."""
    return option(
        False,
        "for convolutions with a kernel: a core (rank, rank, kernel) between a factor of the channels out and one of those in",
        peft="use_effective_conv2d",
    )


def tucker(core: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """`Σ core[i, j, k] U[i, o] V[j, c]` as a matrix (out, channels · kernel); core (rank, rank, kernel), U (rank, out), V
    (rank, channels)."""
    return torch.einsum("ijk,io,jc->ock", core, U, V).flatten(1)


def steps_option(default: int | float, doc: str, **declared: Any) -> Any:
    """A number of steps: a count, or a share of the run below 1 (see `share_of`)."""
    shown = "a count of steps, or a share of the run below 1"
    return option(default, doc, allows=lambda given: isinstance(given, int) or given < 1, shown=shown, **declared)


def share_of(steps: int | float, total: int) -> int:
    """A number of steps from a count or a share of the run below 1."""
    return math.floor(steps * total) if isinstance(steps, float) and steps < 1 else int(steps)


_lenient: ContextVar[bool] = ContextVar("lenient", default=False)


@contextmanager
def lenient() -> Iterator[None]:
    """Within the block, options that PEFT takes and that do no harm are taken: a rank that is of no use, and a block's size
    that does not divide (the nearest that does is used)."""
    token = _lenient.set(True)
    try:
        yield
    finally:
        _lenient.reset(token)


def is_lenient() -> bool:
    """Whether this is within `lenient`."""
    return _lenient.get()


class Bounded(Method):
    """A method whose rank is at most the smaller side of the matrix."""

    rank: int
    beyond = ""
    """What is wrong with a higher one, besides that it is of no use."""

    def check(self, shape: Shape, path: str) -> None:
        smaller = min(shape.out, shape.in_)
        if self.rank > smaller and (self.beyond or not is_lenient()):
            raise LorakitError(
                f"attach: rank {self.rank} exceeds the maximum useful rank of {path} ({shape.out} × {shape.in_}), "
                f"{smaller}{self.beyond}. Give it less by rank_pattern={{{path!r}: {smaller}}}, or leave the layer out."
            )


def divisors(size: int) -> list[int]:
    """All divisors, ascending."""
    return [number for number in range(1, size + 1) if size % number == 0]


def check_divides_sides(option: str, unit: int, shape: Shape, path: str) -> None:
    """LorakitError unless `unit` divides both sides of a matrix; names the largest that do."""
    common = math.gcd(shape.out, shape.in_)
    if common % unit:
        raise LorakitError(
            f"attach: {option} {unit} does not divide both sides of {path} ({shape.out} × {shape.in_}). For this layer "
            f"{', '.join(map(str, divisors(common)[-6:]))} would; one must fit all layers, so choose a common divisor or "
            "leave this one out."
        )
