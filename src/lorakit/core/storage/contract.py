"""The contract of a storage, plain floating-point weights, and how a tensor of a layer is found by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Number formats whose entries are the weight itself. Eight-bit floats are not among them: they come with scales."""


@dataclass(frozen=True)
class Snapshot:
    """A weight as it was at some moment, by its very objects.

    Attributes:
        read: gives it as floats in its stored shape, whatever the layer holds by now.
        restore: puts the very objects back into the layer.
    """

    read: Callable[[], Tensor]
    restore: Callable[[], None]


class Storage(ABC):
    """How one kind of layer stores its weight. Has no state; the layer is handed to each call.

    A storage says what objects a weight consists of (`present`), which floats they stand for (`floats`), how floats become
    such objects (`packed`) and where they go in a layer (`place`); reading, writing and snapshots follow.
    """

    name: str

    @abstractmethod
    def holds(self, layer: nn.Module, tensor: str) -> bool:
        """Whether this storage reads the named tensor of this layer."""

    def present(self, layer: nn.Module, tensor: str) -> Any:
        """The very objects that the weight consists of now; by default the one that stands under the name."""
        return value_of(layer, tensor)

    @abstractmethod
    def floats(self, weight: Any) -> Tensor:
        """What these objects stand for, as floats in the stored shape (the very tensor where it is float already)."""

    @abstractmethod
    def packed(self, like: Any, values: Tensor) -> Any:
        """New objects for `values` (in the stored shape), quantised in the very way in which `like` is."""

    def place(self, layer: nn.Module, tensor: str, weight: Any) -> None:
        """Put objects into the layer in place of the present ones."""
        module, name = owner(layer, tensor)
        setattr(module, name, weight)

    @abstractmethod
    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        """Bytes that the weight takes, its scales and code books included."""

    def read(self, layer: nn.Module, tensor: str) -> Tensor:
        """The weight as floats in its stored shape (the very tensor where it is float already). Never modify it."""
        return self.floats(self.present(layer, tensor))

    def write(self, layer: nn.Module, tensor: str, values: Tensor, fresh: bool = False) -> float:
        """Store `values` (in the stored shape); returns the relative Frobenius error that storing made beyond the float
        dtype's rounding. With `fresh` the layer gets new tensor objects and the present ones stay as they are."""
        made = self.packed(self.present(layer, tensor), values)
        self.place(layer, tensor, made)
        return relative_error(self.floats(made), values)

    def snapshot(self, layer: nn.Module, tensor: str) -> Snapshot:
        """The present weight, to be read and put back after a `write` with `fresh`."""
        before = self.present(layer, tensor)
        return Snapshot(lambda: self.floats(before), lambda: self.place(layer, tensor, before))

    def rounded(self, layer: nn.Module, tensor: str, values: Tensor) -> Tensor:
        """What `read` would give after `write(values)`, in float32 or better; the layer stays as it is."""
        stored = self.floats(self.packed(self.present(layer, tensor), values))
        return stored.to(torch.promote_types(stored.dtype, torch.float32))

    def label(self, layer: nn.Module, tensor: str) -> str:
        """The number format of this layer's weight, for people and files: "float", "nf4", "int8"."""
        return self.name

    def refusal(self, layer: nn.Module, tensor: str) -> str:
        """Why nothing can be written into this layer; empty where it can."""
        return ""

    def settle(self, layer: nn.Module) -> None:  # noqa: B027 - most layers need nothing
        """Called when an adapter comes on the model: see that the layer gives its inputs their gradient in every mode."""


def owner(layer: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """The module of a layer that has the named tensor, and the attribute's name."""
    path, _, name = tensor.rpartition(".")
    return (layer.get_submodule(path) if path else layer), name


def value_of(layer: nn.Module, tensor: str) -> Any:
    """What stands under the tensor's name; None where nothing does."""
    module, name = owner(layer, tensor)
    return getattr(module, name, None)


def comes_from(value: object, library: str) -> bool:
    """Whether an object's class is a library's, told without importing the library."""
    return any(kind.__module__.partition(".")[0] == library for kind in type(value).__mro__)


def relative_error(stored: Tensor, values: Tensor) -> float:
    """‖stored - values‖ / ‖values‖ (Frobenius), in float32 or better."""
    precise = torch.promote_types(values.dtype, torch.float32)
    size = float(torch.linalg.vector_norm(values, dtype=precise))
    error = float(torch.linalg.vector_norm(stored.to(precise) - values.to(precise)))
    return error / size if size else error


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors together."""
    return sum(one.numel() * one.element_size() for one in tensors)


class Float(Storage):
    """Plain floating-point tensors."""

    name = "float"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        value = value_of(layer, tensor)
        plain = type(value) in (nn.Parameter, Tensor) or type(value).__name__ == "DTensor"  # FSDP2's
        return plain and value.dtype in FLOATS

    def floats(self, weight: Tensor) -> Tensor:
        return weight.detach()

    def packed(self, like: Tensor, values: Tensor) -> Tensor:
        copy = like.detach().clone().copy_(values.detach())
        return type(like)(copy, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else copy

    def write(self, layer: nn.Module, tensor: str, values: Tensor, fresh: bool = False) -> float:
        if fresh:
            self.place(layer, tensor, self.packed(self.present(layer, tensor), values))
        else:  # in place, so that ties and optimisers keep the object
            self.read(layer, tensor).copy_(values.detach())
        return 0.0

    def nbytes(self, layer: nn.Module, tensor: str) -> int:
        return size_of([self.read(layer, tensor)])


def finite(value: Tensor) -> bool:
    """Whether no number is a NaN or an infinity. Their sum says so at a tenth of the cost, except where it overflows itself."""
    summed = value.dtype.itemsize > 1 and math.isfinite(float(value.sum()))
    return summed or bool(torch.isfinite(value).all())
