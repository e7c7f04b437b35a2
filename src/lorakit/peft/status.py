"""What PEFT's `get_model_status` and `get_layer_status` tell of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorakit.adapter.adapter import adapters
from lorakit.core.state import state_of


@dataclass
class TunerModelStatus:
    """What `get_model_status` finds."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Any]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)


def model_status(base: nn.Module, model: nn.Module) -> TunerModelStatus:
    """Which adapters are on a base, and how they are; `model` is what was given, the base or a wrapper of it."""
    state, known = state_of(base), adapters(base)
    flags = {name: {one.requires_grad for one in own.parameters()} for name, own in known.items()}
    devices = {name: sorted({str(one.device) for one in own.parameters()}) for name, own in known.items()}
    total = list(base.parameters())
    configs = getattr(model, "peft_config", {}) if model is not base else {}
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: str(one.peft_type) for name, one in configs.items()},
        trainable_params=sum(one.numel() for one in total if one.requires_grad),
        total_params=sum(one.numel() for one in total),
        num_adapter_layers=len({path for own in known.values() for path in own.layers}),
        enabled=bool(state.routing.names or state.merged),
        active_adapters=list(state.routing.names),
        merged_adapters=sorted(state.merged),
        requires_grad={name: own.pop() if len(own) == 1 else "irregular" for name, own in flags.items()},
        available_adapters=sorted(known),
        devices=devices,
    )


@dataclass
class TunerLayerStatus:
    """What `get_layer_status` finds of one layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    available_adapters: list[str]


def layer_status(base: nn.Module) -> list[TunerLayerStatus]:
    """The adapters of each adapted layer."""
    state, known = state_of(base), adapters(base)
    paths = dict.fromkeys(path for own in known.values() for path in own.layers)
    own = {path: [name for name, one in known.items() if path in one.layers] for path in paths}
    return [
        TunerLayerStatus(
            path,
            ", ".join(known[name].method.name for name in names),
            bool(set(names) & {*state.routing.names, *state.merged}),
            [name for name in names if name in state.routing.names],
            [name for name in names if name in state.merged],
            names,
        )
        for path, names in own.items()
    ]
