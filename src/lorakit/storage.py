"""How frozen numbers are held: read a weight as floats, write floats back.

Everything that needs a base weight's values asks here, so that a quantised base is one more storage and no method,
layout or algebra knows of it. `read` gives the numbers that the layer computes with; `write` returns the error it made
(zero for floats).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError


class Storage(ABC):
    """How one kind of layer holds its weight."""

    name: str
    writable: bool = True

    @abstractmethod
    def holds(self, layer: nn.Module, tensor: str) -> bool:
        """Whether this storage reads the named tensor of this layer."""

    @abstractmethod
    def read(self, layer: nn.Module, tensor: str) -> Tensor:
        """The weight as floats in its stored shape (the very tensor where it is float already). Never modify it."""

    @abstractmethod
    def write(self, layer: nn.Module, tensor: str, values: Tensor) -> float:
        """Store `values`; returns the relative Frobenius error that storing made beyond the float dtype's rounding."""


def _owner(layer: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    path, _, name = tensor.rpartition(".")
    return (layer.get_submodule(path) if path else layer), name


class Float(Storage):
    """Plain floating-point tensors."""

    name = "float"

    def holds(self, layer: nn.Module, tensor: str) -> bool:
        module, name = _owner(layer, tensor)
        value = getattr(module, name, None)
        return type(value) in (nn.Parameter, Tensor) and cast(Tensor, value).is_floating_point()

    def read(self, layer: nn.Module, tensor: str) -> Tensor:
        module, name = _owner(layer, tensor)
        return cast(Tensor, getattr(module, name)).detach()

    def write(self, layer: nn.Module, tensor: str, values: Tensor) -> float:
        module, name = _owner(layer, tensor)
        with torch.no_grad():
            cast(Tensor, getattr(module, name)).copy_(values)
        return 0.0


STORAGES: list[Storage] = [Float()]


def storage_of(layer: nn.Module, tensor: str, path: str = "") -> Storage:
    """The storage that holds the named tensor of this layer; LorakitError where none does."""
    for storage in STORAGES:
        if storage.holds(layer, tensor):
            return storage
    module, name = _owner(layer, tensor)
    found = type(getattr(module, name, None)).__name__
    raise LorakitError(
        f"{path or type(layer).__name__}.{tensor} is held as {found} in a {type(layer).__name__}, which no known storage "
        f"reads. Known: {', '.join(storage.name for storage in STORAGES)}."
    )
