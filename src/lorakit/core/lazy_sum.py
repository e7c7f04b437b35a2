"""`W + ΔW` for a low-rank ΔW as one tensor that is never built where it is only multiplied.

A layer whose forward lorakit does not know (a stack of experts, a bare matrix) is reached by putting other tensors
in the place of its own. Where these are `W + s B A`, building the sum costs as much memory as the weights: for the
experts of one layer of a large mixture more than a gigabyte, kept for the backward too. `LazySum` holds the three
factors and answers the products that models make of weights, `x W`, by `x W + (x U) V`: linear, matmul, batched and
grouped products, of views, slices and gathered experts. Whatever else is asked of it is answered by the sum itself,
so that the result is exact for any forward.

In the words of the matrix as it stands: `W` is (..., rows, columns), `U` (..., rows, rank), `V` (..., rank,
columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map


class LazySum(Tensor):
    """`W + U V`, see the module."""

    W: Tensor
    U: Tensor
    V: Tensor
    dropout: float

    @staticmethod
    def __new__(cls, W: Tensor, U: Tensor, V: Tensor, dropout: float = 0.0) -> LazySum:
        """`dropout` is the probability with which an entry of x is zeroed on its way to U."""
        return Tensor._make_wrapper_subclass(cls, W.shape, dtype=W.dtype, device=W.device)

    def __init__(self, W: Tensor, U: Tensor, V: Tensor, dropout: float = 0.0) -> None:
        self.W, self.U, self.V, self.dropout = W, U, V, dropout

    def whole(self) -> Tensor:
        """The sum itself, in W's dtype; added in the better of the two."""
        precise = torch.promote_types(self.W.dtype, self.U.dtype)
        return (self.W.to(precise) + (self.U @ self.V).to(precise)).to(self.W.dtype)

    def _as(self, W: Tensor, U: Tensor, V: Tensor) -> LazySum:
        return LazySum(W, U, V, self.dropout)

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
        low = grouped(_dropped(x, weight), weight.U, offs)
        return _sum(operation(x, weight.W, offs=offs), grouped(low, weight.V, offs))

    return product


def grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`x` (rows, in) in the order of the groups times `weight` (groups, in, out): (rows, out). Rows behind the last
    are zero."""
    ends = offs.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    pieces = [part @ weight[index] for index, part in enumerate(x[: ends[-1]].split(sizes)) if len(part)]
    rest = x.shape[0] - ends[-1]
    if rest or not pieces:
        pieces.append(x.new_zeros(rest, weight.shape[2]) + 0 * weight.sum())
    return torch.cat(pieces)


# -- views -----------------------------------------------------------------------------------------------------------------


def _transpose(weight: Any, first: int, second: int) -> Any:
    axes = {first % weight.ndim, second % weight.ndim}
    if axes == {weight.ndim - 2, weight.ndim - 1}:
        return weight._as(weight.W.transpose(first, second), weight.V.transpose(-2, -1), weight.U.transpose(-2, -1))
    return NotImplemented


def _turned(weight: Any, *_: Any) -> Any:
    return _transpose(weight, -2, -1) if weight.ndim == 2 else NotImplemented


def _turned_last(weight: Any, *_: Any) -> Any:
    return _transpose(weight, -2, -1)


def _item(weight: Any, index: Any) -> Any:
    """One expert, or some: an index into the axes before the matrix."""
    if not isinstance(weight, LazySum) or weight.ndim < 3:
        return NotImplemented
    if isinstance(index, int) or (
        isinstance(index, Tensor) and not isinstance(index, LazySum) and index.dtype != torch.bool
    ):
        return weight._as(weight.W[index], weight.U[index], weight.V[index])
    return NotImplemented


def _same(operation: Callable[..., Any]) -> Callable[..., Any]:
    """What changes a dtype, a device or the memory, and no number."""

    def answer(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, LazySum):
            return NotImplemented
        return weight._as(operation(weight.W, *args, **kwargs), weight.U, weight.V)

    return answer


def _detached(weight: Any) -> Any:
    return weight._as(weight.W.detach(), weight.U.detach(), weight.V.detach())


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
