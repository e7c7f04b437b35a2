"""The contract of an initialiser, what it sees, what it gives, and the one that leaves a delta as its method made it.

An initialiser maps numbers to numbers: a matrix's shape, rank and scale, where it asks for them the weight and what was
measured on data, to the factors (B, A). It knows no layer and no method, so each works with every method whose factors
can be set, on every layer kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.core.delta import Shape
from lorakit.core.options import check
from lorakit.errors import LorakitError

Needs = Literal["nothing", "weight", "inputs", "gradients"]


class Statistic(Protocol):
    """What is kept of a layer's inputs while batches pass: small, and fed one batch at a time."""

    def add(self, samples: Sequence[Tensor]) -> None:
        """Take in one batch: for each of its rows the inputs (tokens, in), in float32 or better."""


@dataclass(frozen=True)
class Measured:
    """One matrix and what has been measured of it so far. `scale` is the s of ΔW = s B A."""

    shape: Shape
    rank: int
    scale: float
    statistic: Any


@dataclass(frozen=True)
class Start:
    """What an initialiser sees of one matrix.

    Attributes:
        path: the layer's name, for messages.
        shape: of the matrix.
        rank: rows of A and columns of B.
        scale: the s of ΔW = s B A.
        like: a tensor with the device and dtype that the factors will have.
        weight: gives the frozen weight (out, in).
        statistic: what was measured: an initialiser's own `statistic`, or the mean gradient (out, in); else None.
        stored: what the layer would hold if it were given a weight (out, in), where it holds few bits; None where floats.
    """

    path: str
    shape: Shape
    rank: int
    scale: float
    like: Tensor
    weight: Callable[[], Tensor]
    statistic: Any = None
    stored: Callable[[Tensor], Tensor] | None = None

    @property
    def W(self) -> Tensor:
        """The frozen weight (out, in) in float32 or better."""
        W = self.weight().detach()
        return W.to(torch.promote_types(W.dtype, torch.float32))

    def root_scale(self, name: str) -> float:
        """√s, by which both factors are divided so that s B A is what was meant."""
        if self.scale <= 0:
            raise LorakitError(
                f"attach: init={name!r} divides its factors by the root of the scale, which is {self.scale} for {self.path}; "
                "give an alpha above 0."
            )
        return float(self.scale**0.5)

    def zeros(self, rows: int, columns: int) -> Tensor:
        """A zero matrix for a factor."""
        return self.like.new_zeros(rows, columns)


class Factors(NamedTuple):
    """Where a delta starts: B (out, rank), A (rank, in); and the weight (out, in) that is put in the frozen one's place, for
    initialisers that rewrite it (what the layer then holds is `Start.stored` of it)."""

    B: Tensor
    A: Tensor
    W: Tensor | None = None


class CalibrationRequest:
    """What is to be measured on batches and for whom (`calibration.calibrate`)."""

    needs: ClassVar[Needs] = "nothing"
    """What must be known of a layer: nothing, its weight, its inputs, or its weight's gradient. The last two are measured
    on batches."""
    completions: ClassVar[bool] = False
    """Whether inputs at positions without a label are left out."""
    squares: ClassVar[bool] = False
    """Whether gradients are squared, entry by entry and batch by batch, before they are summed up."""

    @property
    def request(self) -> str:
        """Who asks, at the beginning of messages: the verb, a colon, the option."""
        raise NotImplementedError

    @property
    def otherwise(self) -> str:
        """What to do about a layer that cannot be measured, a sentence."""
        raise NotImplementedError

    def statistic(self, shape: Shape, rank: int) -> Statistic:
        """A new statistic of the inputs of one matrix, or of several with the same inputs (the largest rank given)."""
        raise NotImplementedError(f"{self.request} measures no inputs")

    def numbers(self, shape: Shape, rank: int) -> int:
        """How many numbers are kept for one matrix while batches pass."""
        return shape.out * shape.in_

    def settled(self, matrices: Mapping[str, Measured]) -> bool:
        """Whether further batches would not change the result."""
        return False


@dataclass(frozen=True, kw_only=True)
class Initialiser(CalibrationRequest, ABC):
    """Initial values for low-rank deltas; subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]
    shifts: ClassVar[bool] = False
    """Whether B A is not zero and has to be taken off, so that the model starts as its base (`core.offset`)."""
    rewrites: ClassVar[bool] = False
    """Whether the base's weight is replaced."""
    redistributes: ClassVar[bool] = False
    """Whether ranks are given to layers by what was measured (`ranks`)."""

    def __post_init__(self) -> None:
        check(self, f"init {self.name}")

    @property
    def request(self) -> str:
        return f"attach: init={self.name!r}"

    @property
    def otherwise(self) -> str:
        return "Leave it out by exclude_modules, or choose a start that needs the weight alone (pissa, olora, …)."

    @abstractmethod
    def factors(self, start: Start) -> Factors:
        """The factors from which a delta starts."""

    def check(self, shape: Shape, rank: int, path: str) -> None:
        """Raise LorakitError where this start cannot be used on a matrix of this shape at this rank."""

    def ranks(self, matrices: Mapping[str, Measured]) -> dict[str, int]:
        """The rank of each matrix; asked where `redistributes`. 0 takes its adapter away."""
        return {name: matrix.rank for name, matrix in matrices.items()}


@dataclass(frozen=True, kw_only=True)
class Default(Initialiser):
    """The initial values that the method's paper gives."""

    name: ClassVar[str] = "default"

    def factors(self, start: Start) -> Factors:
        raise NotImplementedError("the default start is the method's own")
