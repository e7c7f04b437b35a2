"""Adapted layers as transformers and diffusers see them, which switch the adapters of a model layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

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
