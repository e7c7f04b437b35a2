"""`W + ΔW` for a low-rank ΔW as one tensor that is never built where it is only multiplied.

A layer whose forward lorakit does not know (a stack of experts, a bare matrix) is reached by putting other tensors
in the place of its own. Where these are `W + s B A`, building the sum costs as much memory as the weights: for the
experts of one layer of a large mixture more than a gigabyte, kept for the backward too. `LazySum` holds the three
factors and answers the products that models make of weights, `x W`, by `x W + (x U) V`: linear, matmul, batched and
grouped products, of views, slices and gathered experts. Whatever else is asked of it is answered by the sum itself,
so that the result is exact for any forward.

In the words of the matrix as it stands: `W` is (..., rows, columns), `U` (..., rows, rank), `V` (..., rank,
columns). The factors of a stack of experts stay apart, one pair for each expert, and a grouped product reads them where
they are: put into one tensor they would be copied at each step, and so would their gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Pairs:
    """The factors of a stack of experts: `scale B A` for each, B (out, rank) and A (rank, in); ranks may differ.

    Attributes:
        turned: the stack as it stands is (experts, in, out).
    """

    factors: tuple[tuple[Tensor, Tensor], ...]
    scales: tuple[float, ...]
    turned: bool

    def transposed(self) -> Pairs:
        """The same for the stack with its last two axes exchanged."""
        return dataclasses.replace(self, turned=not self.turned)

    def one(self, index: int) -> tuple[Tensor, Tensor]:
        """`(U, V)` of one expert."""
        B, A = self.factors[index]
        B = B if self.scales[index] == 1.0 else B * self.scales[index]
        return (A.mT, B.mT) if self.turned else (B, A)

    def stacked(self, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """`(U, V)` of all experts (experts, rows, rank) and (experts, rank, columns), filled up with zeros to the largest
        rank and to a multiple of so many."""
        rank = max(A.shape[0] for _, A in self.factors)
        rank += -rank % multiple
        ones = [self.one(index) for index in range(len(self.factors))]
        return (
            torch.stack([F.pad(U, (0, rank - U.shape[-1])) for U, _ in ones]),
            torch.stack([F.pad(V, (0, 0, 0, rank - V.shape[-2])) for _, V in ones]),
        )


class LazySum(Tensor):
    """`W + U V`, see the module."""

    W: Tensor
    factors: tuple[Tensor, Tensor] | Pairs
    dropout: float

    @staticmethod
    def __new__(cls, W: Tensor, factors: tuple[Tensor, Tensor] | Pairs, dropout: float = 0.0) -> LazySum:
        """`factors`: (U, V). `dropout` is the probability with which an entry of x is zeroed on its way to U."""
        return Tensor._make_wrapper_subclass(cls, W.shape, dtype=W.dtype, device=W.device)

    def __init__(self, W: Tensor, factors: tuple[Tensor, Tensor] | Pairs, dropout: float = 0.0) -> None:
        self.W, self.factors, self.dropout = W, factors, dropout

    @property
    def U(self) -> Tensor:
        return self.pair()[0]

    @property
    def V(self) -> Tensor:
        return self.pair()[1]

    def pair(self) -> tuple[Tensor, Tensor]:
        """`(U, V)` as tensors."""
        if isinstance(self.factors, Pairs):
            self.factors = self.factors.stacked()
        return self.factors

    def pairs(self) -> Pairs:
        """The factors of a stack, expert by expert."""
        if isinstance(self.factors, Pairs):
            return self.factors
        U, V = self.factors
        factors = tuple((B, A) for B, A in zip(U.unbind(), V.unbind(), strict=True))
        return Pairs(factors, (1.0,) * len(factors), turned=False)

    def whole(self) -> Tensor:
        """The sum itself, in W's dtype; added in the better of the two."""
        precise = torch.promote_types(self.W.dtype, self.U.dtype)
        return (self.W.to(precise) + (self.U @ self.V).to(precise)).to(self.W.dtype)

    def _as(self, W: Tensor, factors: tuple[Tensor, Tensor] | Pairs) -> LazySum:
        return LazySum(W, factors, self.dropout)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"LazySum({tuple(self.W.shape)}, rank {self.U.shape[-1]})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        answer = _ANSWERS.get(func) or _NAMED.get(getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():  # what follows is about plain tensors
            if answer is not None:
                result = answer(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if func in _FACTS:
                return func(*args, **kwargs)
            return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls from below Python (a custom operator, torch.compile): the sum itself."""
        return func(*tree_map(_whole, args), **tree_map(_whole, dict(kwargs or {})))


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, LazySum) else value


def _dropped(x: Tensor, W: LazySum) -> Tensor:
    x = x.to(W.U.dtype) if x.is_meta or not torch.is_autocast_enabled(x.device.type) else x
    return F.dropout(x, W.dropout) if W.dropout else x


def _sum(y: Tensor, change: Tensor) -> Tensor:
    return y + change.to(y.dtype)


# -- products: x W, by the name of the operation ---------------------------------------------------------------------------


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, LazySum) or isinstance(x, LazySum) or isinstance(bias, LazySum):
        return NotImplemented
    return _sum(F.linear(x, weight.W, bias), F.linear(F.linear(_dropped(x, weight), weight.V), weight.U))


def _plain(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`matmul`, `mm`, `bmm`: W from the right, or from the left."""

    def product(x: Any, weight: Any, **options: Any) -> Any:
        if options or (isinstance(x, LazySum) and (isinstance(weight, LazySum) or x.dropout)):
            return NotImplemented
        if isinstance(x, LazySum):  # W y: from the left
            return _sum(operation(x.W, weight), x.U @ (x.V @ weight.to(x.U.dtype)))
        return _sum(operation(x, weight.W), (_dropped(x, weight) @ weight.U) @ weight.V)

    return product


def _added(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`addmm`, `baddbmm`: a bias and a product."""

    def product(bias: Any, x: Any, weight: Any, **options: Any) -> Any:
        if options or isinstance(bias, LazySum) or isinstance(x, LazySum) or not isinstance(weight, LazySum):
            return NotImplemented
        return _sum(operation(bias, x, weight.W), (_dropped(x, weight) @ weight.U) @ weight.V)

    return product


def _grouped(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A grouped product: rows of x in the order of the experts, `offs` (experts,) where each one's end."""

    def product(x: Any, weight: Any, *, offs: Any, **options: Any) -> Any:
        given = any(value is not None for value in options.values())
        if given or isinstance(x, LazySum) or not isinstance(weight, LazySum) or weight.ndim != 3:
            return NotImplemented
        low = F.dropout(x, weight.dropout) if weight.dropout else x
        if x.is_cuda:  # nothing may wait for where experts end; rows must be multiples of 16 bytes
            U, V = (factor.to(x.dtype) for factor in weight.pairs().stacked(16 // x.element_size()))
            return _sum(operation(x, weight.W, offs=offs), operation(operation(low, U, offs=offs), V, offs=offs))
        alone = torch.is_grad_enabled() and not weight.W.requires_grad
        y = None if alone else operation(x, weight.W, offs=offs)
        return by_expert(y, x, None if low is x else low, weight.W, weight.pairs(), offs)

    return product


def by_expert(y: Tensor | None, x: Tensor, low: Tensor | None, W: Tensor, pairs: Pairs, offs: Tensor) -> Tensor:
    """`x W` (rows, columns) plus `low`, which is x with dropout or None, times the low-rank change of each row's expert.

    `y` is `x W` where it is there already; it is changed in place. Else W (experts, in, columns) gets no gradient.
    """
    ends = offs.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    flat = [tensor for B, A in pairs.factors for tensor in ((B, A) if pairs.turned else (A.mT, B.mT))]
    own = (None, x if low is None else low, None) if y is not None else (x, low, W)
    return _ByExpert.apply(y, *own, sizes, pairs.scales, *flat)  # type: ignore[no-any-return, no-untyped-call]


class _ByExpert(Function):
    """`y_e = x_e W_e + s_e (low_e A_eᵀ) B_eᵀ` for the rows of each expert. An expert without rows costs nothing.

    Each expert has another number of rows, and for each number oneDNN makes a kernel for a product in bfloat16, which takes
    longer than the product and stays in memory. So rows are filled up to a multiple, and the thin products are computed in
    the factors' dtype where it is the wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor | None,
        low: Tensor | None,
        W: Tensor | None,
        sizes: list[int],
        scales: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        read = x if low is None else low
        assert read is not None
        if y is not None:
            ctx.mark_dirty(y)
        else:
            assert W is not None
            y = read.new_empty(read.shape[0], W.shape[2])
            y[sum(sizes) :] = 0
        thin = []
        with torch.autocast(read.device.type, enabled=False):  # grouped products do not know it either
            for expert, (own, plain, into) in _parts(sizes, read, read if x is None else x, y):
                B, A = factors[2 * expert : 2 * expert + 2]
                if W is not None:
                    _multiply(plain, W[expert], into)
                thin.append(_wide(own, A) @ _wide(A, own).mT)
                _add(into, thin[-1], B.mT, scales[expert])
        ctx.save_for_backward(read, W, *factors, *thin)
        ctx.sizes, ctx.scales, ctx.apart = sizes, scales, low is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        read, W, *held = ctx.saved_tensors
        factors, thin = held[: 2 * len(ctx.sizes)], iter(held[2 * len(ctx.sizes) :])
        dlow = torch.empty_like(read)
        dx = torch.empty_like(read) if ctx.apart and W is not None else dlow
        for gradient in (dlow, dx):
            gradient[sum(ctx.sizes) :] = 0
        gradients: list[Tensor | None] = [None] * len(factors)
        for expert, (own, above, of_x, of_low) in _parts(ctx.sizes, read, dy, dx, dlow):
            B, A = factors[2 * expert : 2 * expert + 2]
            if W is not None:
                _multiply(above, W[expert].mT, of_x)
            above = _wide(above, B)
            dthin = (above @ _wide(B, above)).mul_(ctx.scales[expert])
            dB = (above.mT @ next(thin)).mul_(ctx.scales[expert])
            dA = dthin.mT @ _wide(own, A)
            gradients[2 * expert : 2 * expert + 2] = dB.to(B.dtype), dA.to(A.dtype)
            if W is not None and dx is dlow:
                _add(of_x, dthin, A, 1.0)
            else:
                of_low.copy_(dthin @ _wide(A, own))
        filled = [
            torch.zeros_like(factor) if gradient is None else gradient
            for gradient, factor in zip(gradients, factors, strict=True)
        ]
        if W is None:  # y came with the base's product in it
            return dy, None, dlow, None, None, None, *filled
        return None, dx, dlow if ctx.apart else None, None, None, None, *filled


MULTIPLE = 16
"""Rows of a product in low precision are filled up to a multiple of this."""


def _multiply(x: Tensor, W: Tensor, into: Tensor) -> None:
    """`into` becomes `x W`."""
    if x.dtype == torch.float32:
        torch.mm(x, W, out=into)
    else:
        into.copy_((F.pad(x, (0, 0, 0, -x.shape[0] % MULTIPLE)) @ W)[: x.shape[0]])


def _add(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """`into += scale left right`, in the wider of their dtypes."""
    if left.dtype == right.dtype == into.dtype:
        into.addmm_(left, right, alpha=scale)
    else:
        into.add_(_wide(left, right) @ _wide(right, left), alpha=scale)


def _wide(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in the wider dtype of the two."""
    return tensor.to(torch.promote_types(tensor.dtype, other.dtype))


def _parts(sizes: list[int], *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each expert that has rows, with them. What is behind the last is nobody's."""
    rows = sum(sizes)
    pieces = zip(*(tensor[:rows].split(sizes) for tensor in tensors), strict=True)
    return ((expert, own) for expert, own in enumerate(pieces) if sizes[expert])


# -- views -----------------------------------------------------------------------------------------------------------------


def _transpose(weight: Any, first: int, second: int) -> Any:
    axes = {first % weight.ndim, second % weight.ndim}
    if axes == {weight.ndim - 2, weight.ndim - 1}:
        own = weight.factors
        turned = own.transposed() if isinstance(own, Pairs) else (own[1].mT, own[0].mT)
        return weight._as(weight.W.transpose(first, second), turned)
    return NotImplemented


def _turned(weight: Any, *_: Any) -> Any:
    return _transpose(weight, -2, -1) if weight.ndim == 2 else NotImplemented


def _turned_last(weight: Any, *_: Any) -> Any:
    return _transpose(weight, -2, -1)


def _item(weight: Any, index: Any) -> Any:
    """One expert, or some: an index into the axes before the matrix."""
    if not isinstance(weight, LazySum) or weight.ndim < 3:
        return NotImplemented
    if isinstance(weight.factors, Pairs) and (isinstance(index, int) or (isinstance(index, Tensor) and not index.ndim)):
        return weight._as(weight.W[index], weight.factors.one(int(index)))
    if isinstance(index, int) or (
        isinstance(index, Tensor) and not isinstance(index, LazySum) and index.dtype != torch.bool
    ):
        return weight._as(weight.W[index], (weight.U[index], weight.V[index]))
    return NotImplemented


def _viewed(weight: Any, *shape: Any) -> Any:
    """A view in the shape that it has."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not isinstance(weight, LazySum) or len(sizes) != weight.ndim:
        return NotImplemented
    same = all(size in (-1, own) for size, own in zip(sizes, weight.shape, strict=True))
    return weight if same else NotImplemented


def _same(operation: Callable[..., Any]) -> Callable[..., Any]:
    """What changes a dtype, a device or the memory, and no number."""

    def answer(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, LazySum):
            return NotImplemented
        return weight._as(operation(weight.W, *args, **kwargs), weight.factors)

    return answer


def _detached(weight: Any) -> Any:
    return weight._as(weight.W.detach(), (weight.U.detach(), weight.V.detach()))


_ANSWERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _plain(torch.matmul),
    Tensor.matmul: _plain(torch.matmul),
    Tensor.__matmul__: _plain(torch.matmul),
    torch.mm: _plain(torch.mm),
    Tensor.mm: _plain(torch.mm),
    torch.bmm: _plain(torch.bmm),
    Tensor.bmm: _plain(torch.bmm),
    torch.addmm: _added(torch.addmm),
    torch.baddbmm: _added(torch.baddbmm),
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    torch.t: _turned,
    Tensor.t: _turned,
    Tensor.T.__get__: _turned,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _turned_last,  # type: ignore[attr-defined]
    Tensor.__getitem__: _item,
    Tensor.view: _viewed,
    Tensor.to: _same(Tensor.to),
    Tensor.contiguous: _same(Tensor.contiguous),
    Tensor.detach: _detached,
}
for _name in ("grouped_mm", "_grouped_mm"):
    for _home in (F, torch):
        if hasattr(_home, _name):
            _ANSWERS[getattr(_home, _name)] = _grouped(getattr(_home, _name))

_NAMED: dict[str, Callable[..., Any]] = {}
"""Operations that are registered by others (transformers' grouped product where torch has none)."""

_FACTS = frozenset(
    {
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout")
    }
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.data_ptr, Tensor.stride}
)
"""What is asked about a tensor and not of its numbers."""
