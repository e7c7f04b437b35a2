"""What an adapter has whole instead of adding to it: trained biases, and the modules of modules_to_save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

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
        for index, name in enumerate(names):
            if name in self.shared:
                continue
            value = value_of(base, name).detach().clone()
            if not value.is_floating_point():
                self.register_buffer(f"tensor_{index}", value)
                continue
            value = value.to(torch.promote_types(value.dtype, dtype or value.dtype))
            if isinstance(value_of(base, name), nn.Parameter):
                setattr(self, f"tensor_{index}", nn.Parameter(value))
            else:
                self.register_buffer(f"tensor_{index}", value)

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensor names -> this adapter's values."""
        return {
            name: self.shared[name] if name in self.shared else cast(Tensor, getattr(self, f"tensor_{index}"))
            for index, name in enumerate(self.names)
        }
