"""Adapted layers as transformers and diffusers see them, which switch the adapters of a model layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from lorakit.adapter.attachment import detach
from lorakit.core.layer import Adapted


class BaseTunerLayer(Adapted):
    """An adapted layer with PEFT's switches. All layers of a model have one state, so each call acts on the whole model and
    repeating it for every layer changes nothing."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these adapters act, added up."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.state.set(dict.fromkeys(names, 1.0))

    def enable_adapters(self, enabled: bool) -> None:
        """Let none act, or those that acted before."""
        names = self.state.routing.names
        if not enabled and names:
            self.__dict__["acted"] = names
            self.state.set(None)
        elif enabled and not names:
            self.state.set(dict.fromkeys(self.__dict__.get("acted", self.state.adapters), 1.0))

    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter off the model."""
        adapter: Any = self.state.adapters.get(adapter_name)
        if adapter is not None:
            detach(adapter.model, adapter_name)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are in this layer's weights just now."""
        return [name for name in self.state.merged if name in self.deltas or name in self.replacements]

    @property
    def merged(self) -> bool:
        """Whether any adapter is in this layer's weights just now."""
        return bool(self.merged_adapters)

    @property
    def base_layer(self) -> nn.Module:
        """The layer as it was."""
        return self.base

    def get_base_layer(self) -> nn.Module:
        """The layer as it was."""
        return self.base_layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight."""
        (delta,), (site,) = self.deltas_of(adapter).values(), self.sites.values()
        W = self.stored(site)
        return site.layout.weight(delta.dense(site.layout.matrix(W)), W)

    @property
    def scaling(self) -> dict[str, float]:
        """The scale of each adapter."""
        return {name: cast(Any, one).scale for name in self.deltas for one in self.deltas_of(name).values()}

    @property
    def r(self) -> dict[str, int]:
        """The rank of each adapter."""
        return {name: cast(Any, one.spec).rank for name in self.deltas for one in self.deltas_of(name).values()}

    @property
    def in_features(self) -> int:
        """Inputs of the base, channels and rows of an embedding among them."""
        return self._first("in_features", "in_channels", "num_embeddings", "nx", "embed_dim")

    @property
    def out_features(self) -> int:
        """Outputs of the base."""
        return self._first("out_features", "out_channels", "embedding_dim", "nf", "embed_dim")

    def _first(self, *names: str) -> int:
        found = next((getattr(self.base, name) for name in names if hasattr(self.base, name)), None)
        if found is None:
            raise AttributeError(f"{type(self.base).__name__} has none of {', '.join(names)}")
        return cast(int, found)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return list(self.state.routing.names)

    active_adapter = active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether none acts."""
        return not self.state.routing.names


def as_tuner_layers(model: nn.Module) -> None:
    """Give the adapted layers of a model PEFT's switches."""
    for module in model.modules():
        if type(module) is Adapted:
            layer: Any = module
            layer.__class__ = BaseTunerLayer
