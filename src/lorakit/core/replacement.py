"""What an adapter has whole instead of adding to it: trained biases, and the modules of modules_to_save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.storage import value_of


class Replacement(nn.Module):
    """One adapter's own values for some named tensors of a layer: trained biases, or a whole module (modules_to_save).

    As with deltas, several blend: the layer runs with `base + Σ weight · (own - base)`.
    """

    def __init__(
        self,
        base: nn.Module,
        names: list[str],
        dtype: torch.dtype | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`shared`: name -> the value of another layer that has the same weight, which is this layer's too."""
        super().__init__()
        self.names = tuple(names)
        self.shared = {name: tensor for name, tensor in (shared or {}).items() if name in names}
        for name in names:
            if name in self.shared:
                continue
            value = value_of(base, name).detach().clone()
            if value.is_floating_point():
                value = value.to(torch.promote_types(value.dtype, dtype or value.dtype))
            if value.is_floating_point() and isinstance(value_of(base, name), nn.Parameter):
                self.register_parameter(self.attribute(name), nn.Parameter(value))
            else:
                self.register_buffer(self.attribute(name), value)

    def attribute(self, name: str) -> str:
        """Where it keeps the layer's tensor of this name; the end stays, by which optimisers know biases."""
        return f"own_{name.replace('.', '_')}"

    def __getattr__(self, name: str) -> Any:
        """Its own values by the names that they have in the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self.__dict__.get("names", ()):
                raise
            return self.tensors()[name]

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensor names -> this adapter's values."""
        return {
            name: self.shared[name] if name in self.shared else cast(Tensor, getattr(self, self.attribute(name)))
            for name in self.names
        }
