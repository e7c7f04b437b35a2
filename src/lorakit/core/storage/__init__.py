"""How frozen weights are stored: read a weight as floats, write floats back, quantised where it was.

Everything that needs a base weight's values asks here, so that a quantised base is one more storage and no method,
layout or algebra knows of it. `read` gives the numbers that the layer computes with; `write` returns the error it made
(zero for floats). A quantisation library is recognised by the class of what it made, and imported only then.
"""

from __future__ import annotations

from torch import nn

from lorakit.core.storage.bitsandbytes import EightBit, FourBit
from lorakit.core.storage.blocks import Blocks
from lorakit.core.storage.contract import Float, Snapshot, Storage, owner, value_of
from lorakit.core.storage.frozen import Frozen
from lorakit.core.storage.hqq import HQQ
from lorakit.core.storage.torchao import TorchAO
from lorakit.errors import LorakitError

FLOAT = Float()

STORAGES: list[Storage] = [FLOAT, FourBit(), EightBit(), TorchAO(), HQQ(), Blocks(), Frozen()]
"""Asked in this order; the last takes any layer that is called like a linear one."""


def storage_of(layer: nn.Module, tensor: str, path: str = "") -> Storage:
    """The storage that holds the named tensor of this layer; LorakitError where none does."""
    for storage in STORAGES:
        if storage.holds(layer, tensor):
            return storage
    found = type(value_of(layer, tensor)).__name__
    raise LorakitError(
        f"{path or type(layer).__name__}.{tensor} is a {found} in a {type(layer).__name__}, which no known storage reads. "
        f"Known: {', '.join(storage.name for storage in STORAGES)}."
    )


def settle(model: nn.Module) -> None:
    """See that every layer of a model gives its inputs a gradient, also after the model was asked in evaluation mode."""
    for storage in STORAGES:
        storage.settle(model)


__all__ = ["FLOAT", "STORAGES", "Float", "Snapshot", "Storage", "owner", "settle", "storage_of", "value_of"]
