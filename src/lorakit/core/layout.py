"""Any layer's weight as an (out, in) matrix, and what the layer does with such a matrix.

A `Layout` is the only place that knows a layer kind. Methods see matrices; a new layer kind works with every method
as soon as its layout does. A layer may hold several matrices (attention keeps two), each is a `Site`.

    kind          weight as stored          matrix
    Linear        (out, in)                 as it is; also any packed layer with the two sizes that is called like one
    Transposed    (in, out)                 its transpose (transformers' Conv1D)
    Convolution   (out, in/groups, *k)      (out, in/groups · k), for 1, 2 and 3 dimensions
    Embedding     (vocabulary, dim)         its transpose: out = dim, in = vocabulary, inputs are one-hot
    Rows          some rows of another      fused projections, a part of which is adapted
    Attention     nn.MultiheadAttention     its projections, reached by substitution only
    Expert        (experts, out, in)        one expert of a stack, or (in, out) each; reached by substitution only
    Bare          any, read by a forward    a parameter that a module multiplies by itself
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Shape
from lorakit.errors import LorakitError


class Layout(ABC):
    """How one layer's weight is a matrix. Holds no tensors; the layer is handed to each call."""

    kind: str
    shape: Shape
    flat: bool = False
    """The layer is `x Wᵀ + b` over the last axis, so that the fused product of kernel.py applies."""
    beside: bool = True
    """ΔW can act beside the layer. Where not, the layer is called with its weights substituted."""
    batch_axis: int | None = None
    """Where a module's inputs cannot be taken apart by row: the axis of the batch in its first input and its outputs."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, in): a view where possible."""

    @abstractmethod
    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`: `M` (out, in) in the shape of the stored weight `like`."""

    @abstractmethod
    def linear(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        """What the layer does to `x` with the matrix `M` in place of its own, without bias."""

    def through(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor | None:
        """`linear` by a function of inputs with features last, or None where the layer does not meet its inputs so."""
        return None

    def some(self, layer: nn.Module, x: Tensor, D: Tensor, index: Tensor) -> Tensor:
        """`linear` of the matrix whose rows at `index` (an embedding's columns) are those of `D` (n, ·), all others zero."""
        return self.linear(layer, x, D.new_zeros(self.shape.out, self.shape.in_).index_copy(0, index, D))

    def down(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """The input side of a low-rank product: (..., rank), features last (grouped layers: (..., groups, rank))."""
        return self.linear(layer, x, A)

    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        """The output side: what `down` gave, times Bᵀ, in the layer's output shape."""
        return F.linear(h, B)

    def features(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector over output features, (out,), shaped to broadcast against the layer's output `y`."""
        return v

    def own_bias(self, bias: Tensor) -> Tensor:
        """What of the layer's bias belongs to this matrix, (out,)."""
        return bias

    def placed_bias(self, b: Tensor, bias: Tensor) -> Tensor:
        """A change of `own_bias`, (out,), as a change of the layer's whole `bias`."""
        return b


@dataclass(frozen=True)
class Linear(Layout):
    """`nn.Linear`: the weight is the matrix."""

    shape: Shape
    kind = "linear"
    flat = True

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        return M

    def linear(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        return F.linear(x, M)

    def through(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor | None:
        return f(x)

    def some(self, layer: nn.Module, x: Tensor, D: Tensor, index: Tensor) -> Tensor:
        y = F.linear(x, D)
        return y.new_zeros(*y.shape[:-1], self.shape.out).index_copy(-1, index, y)


@dataclass(frozen=True)
class Transposed(Linear):
    """transformers' `Conv1D`: a linear layer whose weight is stored (in, out)."""

    kind = "transposed"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        return M.mT


@dataclass(frozen=True)
class Convolution(Layout):
    """`nn.Conv1d`, `Conv2d`, `Conv3d` with their stride, padding and its mode, dilation and groups.

    A factor A (rank, in/groups · k) is a convolution to `rank` channels, run once per group; B is a 1×1 convolution.
    """

    shape: Shape
    window: tuple[int, ...]
    """(in/groups, *kernel)"""
    groups: int
    kind = "convolution"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        return M.reshape(like.shape)

    def _run(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        convolve = cast(Any, layer)._conv_forward
        return cast(Tensor, convolve(x, M.reshape(-1, *self.window), None))

    def linear(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        return self._run(layer, x, M)

    def down(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        h = self._run(layer, x, A.repeat(self.groups, 1))
        channel = h.ndim - len(self.window)  # unbatched input has no leading axis
        return cast(Tensor, h.movedim(channel, -1).unflatten(-1, (self.groups, -1)))

    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        per_group = B.unflatten(0, (self.groups, -1))
        y = torch.einsum("...gr,gor->...go", h, per_group).flatten(-2)
        return y.movedim(-1, y.ndim - len(self.window))

    def features(self, v: Tensor, y: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * (len(self.window) - 1))


@dataclass(frozen=True)
class Embedding(Layout):
    """`nn.Embedding`: a linear layer on one-hot inputs, whose weight is stored (vocabulary, dim)."""

    shape: Shape
    kind = "embedding"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        return M.T

    def linear(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        return self._scaled(layer, F.embedding(x, M.T, cast(nn.Embedding, layer).padding_idx))

    def some(self, layer: nn.Module, x: Tensor, D: Tensor, index: Tensor) -> Tensor:
        index, order = index.sort()
        D = torch.cat([D[order], D.new_zeros(1, D.shape[1])])
        place = torch.searchsorted(index, x).clamp_max(len(index) - 1)
        rows = F.embedding(torch.where(index[place] == x, place, len(index)), D)
        padding = cast(nn.Embedding, layer).padding_idx  # whose row has no gradient in a lookup of the whole table
        return self._scaled(
            layer, rows if padding is None else torch.where((x == padding)[..., None], rows.detach(), rows)
        )

    def _scaled(self, layer: nn.Module, rows: Tensor) -> Tensor:
        scale = getattr(layer, "embed_scale", None)  # transformers' scaled word embeddings (Gemma, BART)
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows.dtype)


@dataclass(frozen=True)
class Rows(Layout):
    """Some output rows of a fused linear layer (the q of a qkv), so that each part has its own delta."""

    inner: Linear
    ranges: tuple[tuple[int, int], ...]
    shape: Shape = field(init=False)
    kind = "rows"

    def __post_init__(self) -> None:
        rows = sum(stop - start for start, stop in self.ranges)
        object.__setattr__(self, "shape", Shape(rows, self.inner.shape.in_, bias=self.inner.shape.bias))

    def index(self, device: torch.device | None = None) -> Tensor:
        """The row numbers of this part, (rows,)."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.ranges])

    def matrix(self, weight: Tensor) -> Tensor:
        W = self.inner.matrix(weight)
        return torch.cat([W[start:stop] for start, stop in self.ranges])

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        """`M` in its rows, zero in all others: a change of the whole weight."""
        whole = M.new_zeros(self.inner.shape.out, M.shape[1]).index_copy(0, self.index(M.device), M)
        return self.inner.weight(whole, like)

    def _place(self, part: Tensor) -> Tensor:
        whole = part.new_zeros(*part.shape[:-1], self.inner.shape.out)
        return whole.index_copy(-1, self.index(part.device), part)

    def part(self, y: Tensor) -> Tensor:
        """This part's features of the whole layer's output `y`."""
        return torch.cat([y[..., start:stop] for start, stop in self.ranges], dim=-1)

    def own_bias(self, bias: Tensor) -> Tensor:
        return self.part(bias)

    def placed_bias(self, b: Tensor, bias: Tensor) -> Tensor:
        return self._place(b)

    def linear(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        return self._place(F.linear(x, M))

    def through(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor | None:
        return self._place(f(x))

    def down(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return self._place(F.linear(h, B))

    def features(self, v: Tensor, y: Tensor) -> Tensor:
        return self._place(v)


@dataclass(frozen=True)
class Substituted(Linear):
    """A projection of a layer that can only be reached by substituting its weight (nn.MultiheadAttention)."""

    kind = "attention"
    flat = False
    beside = False


@dataclass(frozen=True)
class Stored(Substituted):
    """A layer of another layout that can only be reached by substituting its weight, since its forward is its own."""

    inner: Layout

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The layer's own: files name its tensors by it."""
        return self.inner.kind

    def matrix(self, weight: Tensor) -> Tensor:
        return self.inner.matrix(weight)

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        return self.inner.weight(M, like)


@dataclass(frozen=True)
class Expert(Layout):
    """One expert of a stack: a slice of a parameter of three axes. All experts of a stack have a matrix of one shape."""

    inner: Linear
    index: int
    count: int
    order: str = ""
    """How the module's input lies: "tokens" of all rows of the batch, one after the other; all of them once for each
    of the "experts"; or empty, where nothing says which row a token is of (they come sorted by expert)."""
    kind = "expert"
    beside = False

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.inner.shape

    def matrix(self, weight: Tensor) -> Tensor:
        return self.inner.matrix(weight[self.index])

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        """`M` in its slice, zero in all others: a change of the whole stack."""
        return self.stacked({self.index: M}, like)

    def stacked(self, changes: Mapping[int, Tensor], like: Tensor) -> Tensor:
        """Changes by expert as one change of the whole stack `like`."""
        one = next(iter(changes.values()))
        rest = one.new_zeros(one.shape)
        return self.inner.weight(torch.stack([changes.get(index, rest) for index in range(self.count)]), like)

    def own_bias(self, bias: Tensor) -> Tensor:
        return bias[self.index]

    def placed_bias(self, b: Tensor, bias: Tensor) -> Tensor:
        whole = b.new_zeros(bias.shape)
        return whole.index_add(0, torch.tensor([self.index], device=b.device), b[None])

    def linear(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        raise LorakitError("an expert of a stack is reached by substitution only.")

    def down(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        raise LorakitError("an expert of a stack is reached by substitution only.")

    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        raise LorakitError("an expert of a stack is reached by substitution only.")


@dataclass(frozen=True)
class FlatExpert(Expert):
    """An expert of a stack that lies in two axes, (experts · rows, columns). Its module is called with (batch, tokens,
    hidden) and with a choice of experts for each token."""

    batch_axis: int | None = 0

    def matrix(self, weight: Tensor) -> Tensor:
        return self.inner.matrix(weight.unflatten(0, (self.count, -1))[self.index])

    def stacked(self, changes: Mapping[int, Tensor], like: Tensor) -> Tensor:
        return super().stacked(changes, like).flatten(0, 1)


@dataclass(frozen=True)
class Bare(Substituted):
    """A parameter that a module multiplies by itself, as a matrix: its first axis against all others, or the other
    way."""

    turned: bool = False
    batch_axis: int | None = None
    kind = "bare"

    def matrix(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        return flat.T if self.turned else flat

    def weight(self, M: Tensor, like: Tensor) -> Tensor:
        return (M.T if self.turned else M).reshape(like.shape)


@dataclass(frozen=True)
class Site:
    """One matrix of a layer: its short name ("" where the layer has one only), its tensors, its layout."""

    name: str
    weight: str
    bias: str | None
    layout: Layout
    named_only: str = ""
    """Why presets leave it out; empty where they do not."""

    def place(self, path: str) -> str:
        """The name of this matrix in a model where its layer stands at `path`."""
        return f"{path}.{self.name}" if self.name else path
