"""What to add to a matrix: the contract that every weight method fulfils.

A method is two small classes in one file: a frozen spec (`Method`) that is the configuration, and a module (`Delta`)
that holds the trainable tensors. A delta must write one thing, `dense(W) -> ΔW`; everything else (acting on
activations, merging, blending, rows with different adapters, saving) follows from it. The family `LowRank` writes
`factors() -> (B, A)` instead and gets the fast gated product of `kernel.py`.

A delta knows matrices, never layers: `layout.py` says how a layer's weight is a matrix.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.options import check, options_of, patterns_of
from lorakit.errors import LorakitError, unknown


@dataclass(frozen=True)
class Shape:
    """The matrix that a delta changes.

    Attributes:
        out: rows of the matrix, the layer's output features.
        in_: columns of the matrix, all input features that one output sees (for convolutions channels × kernel).
        taps: columns per input channel (the kernel's size; 1 for linear layers).
        lookup: the layer's inputs are one-hot (an embedding): columns are vocabulary entries.
        bias: the layer adds a bias to what this matrix gives.
    """

    out: int
    in_: int
    taps: int = 1
    lookup: bool = False
    bias: bool = True


@dataclass(frozen=True)
class Card:
    """What a reader wants to know of a method before using it; the method table is made from these.

    Attributes:
        title: the method's usual name.
        formula: ΔW or y in one line.
        parameters: trainable numbers for one matrix, as a function of its shape and the spec; of an edit (edit.py) all its
            numbers, as a function of the model's anatomy.
        paper: arXiv number or venue.
        use: when to choose it, in one sentence.
        limits: what mathematics forbids, in one sentence; empty if nothing.
        identity: whether a new delta changes nothing before training, at the method's defaults.
        pooled: trainable numbers shared by all layers, as a function of all shapes and the spec.
    """

    title: str
    formula: str
    parameters: Callable[[Any, Any], int]
    paper: str
    use: str
    limits: str = ""
    identity: bool = True
    pooled: Callable[[list[Shape], Any], int] | None = None


@dataclass(frozen=True)
class Form:
    """A delta lowered to `y' = gain · y + bias + B A x`, which is what the server batches.

    `gain` and `bias` are (out,), `B` is (out, rank) with every scale folded in, `A` is (rank, in); each may be None.
    """

    gain: Tensor | None = None
    bias: Tensor | None = None
    B: Tensor | None = None
    A: Tensor | None = None


class Call(Protocol):
    """One call of a layer as a delta sees it (made by `layer.py`)."""

    @property
    def y(self) -> Tensor:
        """`W x` without the bias, in the layer's output shape."""

    @property
    def W(self) -> Tensor:
        """The frozen weight as an (out, in) matrix."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in, that of the activations."""

    @property
    def leading(self) -> torch.Size:
        """The axes of the tokens: those of the layer's input but its features."""

    def linear(self, M: Tensor) -> Tensor:
        """What the layer does with the matrix `M` (out, in) in place of its own, without bias."""

    def through(self, f: Callable[[Tensor], Tensor], M: Callable[[], Tensor]) -> Tensor:
        """`linear(M())` for a matrix that has a cheaper way: `f` maps inputs (..., in) to outputs (..., out). It is used
        where the layer meets its inputs as they are (linear layers); elsewhere (convolutions, lookups) `M` is made."""

    def some(self, D: Tensor, index: Tensor) -> Tensor:
        """`linear` of the matrix whose rows at `index` (an embedding's columns) are those of `D` (n, ·), all others zero."""

    def product(
        self,
        B: Tensor,
        A: Tensor,
        gate: Tensor | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> Tensor:
        """`((x Aᵀ) ⊙ gate) Bᵀ · scale` in the layer's output shape; dropout acts on the input of A."""

    def down(self, A: Tensor) -> Tensor:
        """`x Aᵀ` (…, rank), on the axes that a gate of `product` has, in float32 or better."""

    def whole(
        self,
        B: Tensor,
        A: Tensor,
        gate: Tensor | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> Tensor:
        """`W x + product(…)` in one pass, without the bias."""

    def gain(self, y: Tensor, g: Tensor) -> Tensor:
        """`y` with every output feature multiplied by its entry of `g` (out,)."""


class Spec(ABC):
    """A frozen dataclass whose fields are the options of a delta's method or of an edit: it is the configuration."""

    name: ClassVar[str]
    card: ClassVar[Card]
    schedule: ClassVar[str | None] = None
    """What training does to its tensors besides optimiser steps: a name in `train/schedules.py`."""

    def __post_init__(self) -> None:
        check(self, self.name)

    @property
    def identity(self) -> bool:
        """Whether a new adapter changes nothing before training, with these options."""
        return self.card.identity

    def install(
        self, name: str, model: nn.Module, layers: Mapping[str, nn.Module]
    ) -> tuple[nn.Module | None, list[RemovableHandle]]:
        """Called once when all deltas of adapter `name` are on their layers: what weighs them by token and the hooks that it
        needs around parts of the model, for a method that is a mixture."""
        return None, []

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed; an unknown one is refused."""
        for name in changes:
            if name not in self.option_names():
                raise unknown(f"option of {self.name}", name, self.option_names())
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(options_of(cls))

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data: the method's name and its options."""
        options = {name: getattr(self, name) for name in self.option_names()}
        plain = {key: value.to_dict() if isinstance(value, Spec) else value for key, value in options.items()}
        return {"name": self.name, **plain}


class Method(Spec):
    """The spec of a delta."""

    whole: ClassVar[bool] = False
    """Whether the modules that are targeted train whole, and there are no deltas."""
    delta: ClassVar[type[Delta]]
    """What `build` makes; the delta's class says whose it is: `class LoRADelta(LowRank, of=LoRA)`."""

    @property
    def pattern_fields(self) -> Mapping[str, str]:
        """Options that may differ per layer: name -> PEFT's name of the pattern; a combinator has its inner method's.

        Each has its own `<name>_pattern` in a run's configuration and among the flags, all of which `attach` takes as
        `patterns`: {name: {layer pattern: value}}.
        """
        return patterns_of(type(self))

    def build(self, shape: Shape, pool: Pool) -> Delta:
        """A new delta for one matrix, with the initial values of the paper."""
        return self.delta(self, shape, pool)

    def check(self, shape: Shape, path: str) -> None:
        """Raise LorakitError where this spec cannot be used on a matrix of this shape."""

    def check_layers(self, paths: Sequence[str]) -> None:
        """Raise LorakitError where this spec names layers that are none of the adapted ones."""

    def at(self, path: str) -> Method:
        """The spec for the layer of this name: this one, unless the method treats some layers otherwise than others."""
        return self

    def resized(self, rank: int) -> Self:
        """This spec at another rank, with its scale as it is."""
        return self.replace(rank=rank)


class Pool(nn.Module):
    """Tensors shared by all deltas of one adapter (VeRA's pair, a vector bank). Owned by the Adapter.

    A delta asks for an entry by name with a function that makes it; the first to ask decides its value. `frozen`
    entries are buffers; those that are not `kept` are made anew instead of being read from a file. Deltas ask for an
    entry at each use and never hold it, since its dtype and device follow the layers.
    """

    def __init__(self, shapes: list[Shape] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.shapes = shapes or []
        """All matrices of the adapter, so that a shared tensor can be made large enough at once."""
        self.seed = seed
        self.numbered = 0

    def entry(self, name: str, make: Callable[[], Tensor], frozen: bool, kept: bool = True) -> Tensor:
        """The shared tensor of this name ("v.0": one of several), made on first use."""
        group, _, last = name.rpartition(".")
        if group and group not in self._modules:
            self.add_module(group, nn.Module())
        holder = self.get_submodule(group)
        if not hasattr(holder, last):
            if frozen:
                holder.register_buffer(last, make(), persistent=kept)
            else:
                setattr(holder, last, nn.Parameter(make()))
        return getattr(holder, last)  # type: ignore[no-any-return]

    def number(self) -> int:
        """How many deltas have asked before: of layers in the model's order, the place of the one that asks."""
        self.numbered += 1
        return self.numbered - 1


class Delta(nn.Module, ABC):
    """What one adapter adds to one matrix. Trainable tensors are attributes named with the paper's letters."""

    spec: Method
    shape: Shape
    dropout: float
    _pool: tuple[Pool]
    leader: tuple[Any, ...] = ()
    """The delta whose tensors it has, where its layer shares a weight with that one's. In a tuple: it is no child of this."""

    def __init_subclass__(cls, of: type[Method] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if of is not None:
            of.delta = cls

    def __init__(self, spec: Method, shape: Shape, pool: Pool) -> None:
        super().__init__()
        # Past a module's own __setattr__. The pool in a tuple: it is the adapter's, not a child of every delta.
        self.__dict__.update(spec=spec, shape=shape, dropout=getattr(spec, "dropout", 0.0), _pool=(pool,))

    @property
    def pool(self) -> Pool:
        return self._pool[0]

    @abstractmethod
    def dense(self, W: Tensor) -> Tensor:
        """ΔW (out, in) for the frozen weight `W` (out, in); differentiable."""

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        """Δb (out,) for the frozen bias `b` (None where the layer has none) and what gives the frozen weight (out, in), or
        None: no change."""
        return None

    def follower(self, shape: Shape) -> Delta | None:
        """A delta with these tensors, for a layer that has the same weight as (in, out); None where it has no form of its own
        (see `core.tied`)."""
        return None

    def begin(self, W: Tensor) -> None:
        """Called once when the delta is put on a layer, after its initial values: `W` (out, in) is the frozen weight."""

    def low_rank(self) -> LowRank | None:
        """The low-rank part whose factors an initialiser may set: the delta itself, or a combinator's inner one."""
        return None

    def roles(self) -> dict[str, str]:
        """Attribute -> what an optimiser should treat it as ("B": starts at zero, and LoRA+ moves it faster), where that is
        not the attribute's own name."""
        return {}

    def frozen(self) -> list[nn.Parameter]:
        """Parameters that the method itself never trains (LoRA-FA's A)."""
        return []

    def act(self, call: Call) -> Tensor:
        """`ΔW x` for one call of the layer; the default pushes the dense ΔW through it."""
        return call.linear(self.dense(call.W))

    def output(self, call: Call) -> Tensor | None:
        """`(W + ΔW) x` without the bias, where a method has it cheaper than `W x` and `act` apart; else None."""
        if type(self).act is Delta.act and torch.finfo(call.dtype).bits >= 32:
            # A dense ΔW costs one product as large as W's own, so do both at once; in lower precision not, where W + ΔW
            # would round away what is small beside W.
            return call.linear(call.W + self.dense(call.W))
        return None

    def input_gain(self) -> Tensor | None:
        """What multiplies the layer's input (in,), where that is all that the delta does; else None."""
        return None

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        """The delta lowered for serving, or LorakitError where it has no such form."""
        raise LorakitError(
            f"{self.spec.name} has no form `gain · y + bias + B A x`; merge it, or save it as_='lora' at a stated error."
        )


class LowRank(Delta):
    """The family whose ΔW is `scale · B diag(gate) A`; a member writes `factors`, and `gate` if it has one."""

    scale: float = 1.0

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """`(B, A)`: (out, rank) and (rank, in)."""

    def gate(self) -> Tensor | None:
        """The diagonal in rank space, (rank,), or None where it is constant 1."""
        return None

    def gated(self) -> tuple[Tensor, Tensor]:
        """`(B diag(gate), A)`, whose product is ΔW / scale."""
        B, A = self.factors()
        gate = self.gate()
        return (B if gate is None else B * gate), A

    def low_rank(self) -> LowRank | None:
        return self

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that a file keeps in place of `factors`: pairs (B, A) whose products add up to ΔW / (gate · scale)."""
        return [self.factors()]

    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Start from these factors (an initialiser's result); ΔW becomes `scale · B A`."""
        raise LorakitError(
            f"{self.spec.name} computes its factors, so they cannot be set. Methods whose factors an initialiser can "
            "set: lora, dora, adalora, dylora and others with two factors."
        )

    def truncated(self, rank: int) -> tuple[Tensor, Tensor] | None:
        """`(B, A)` of this rank with the scale folded into B, where the method itself orders its ranks; else None."""
        return None

    def dense(self, W: Tensor) -> Tensor:
        B, A = self.gated()
        return self.scale * (B @ A)

    def act(self, call: Call) -> Tensor:
        B, A = self.factors()
        return call.product(B, A, self.gate(), self.scale, self.dropout if self.training else 0.0)

    def output(self, call: Call) -> Tensor | None:
        B, A = self.factors()
        return call.whole(B, A, self.gate(), self.scale, self.dropout if self.training else 0.0)

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        B, A = self.gated()
        return Form(B=B * self.scale, A=A)
