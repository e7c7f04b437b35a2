"""What PEFT's `get_model_status` and `get_layer_status` tell of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.core.state import state_of
from lorakit.core.walking import walk
from lorakit.errors import LorakitError
from lorakit.files.formats import format_of
from lorakit.peft.layers import ModulesToSaveWrapper

_BACKENDS = {"Linear8bitLt": "bnb 8bit", "Linear4bit": "bnb 4bit"}
"""Class of a quantised layer -> PEFT's name of what quantised it."""


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
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerLayerStatus:
    """What `get_layer_status` finds of one layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Any]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def _together(found: dict[str, list[Any]]) -> dict[str, Any]:
    return {name: own[0] if len(set(own)) == 1 else "irregular" for name, own in found.items() if own}


def _held(adapter: Adapter, path: str, rows: bool) -> list[nn.Parameter] | None:
    """The parameters of an adapter in a layer: of rows that train alone, or all others; None where it has no such there."""
    layer = adapter.layers.get(path)
    if layer is None:
        return None
    deltas = [delta for delta in layer.deltas_of(adapter.name).values() if adapter.beside(delta) is rows]
    replaced = [] if rows or adapter.name not in layer.replacements else [layer.replacements[adapter.name]]
    return [own for held in (*deltas, *replaced) for own in held.parameters()] if deltas or replaced else None


def layer_status(base: nn.Module, wrapped: bool = False) -> list[TunerLayerStatus]:
    """The adapters of each adapted layer, in the model's order; where the model is wrapped, names start with "model."."""
    state, known = state_of(base), adapters(base)
    result = []
    for path, module in walk(base):
        for rows in (False, True):
            own = {name: held for name, one in known.items() if (held := _held(one, path, rows)) is not None}
            if not own:
                continue
            first = next(iter(own))
            layer = known[first].layers[path]
            kind = (format_of(known[first].method.name).peft or known[first].method.name).lower()
            saved = isinstance(layer, ModulesToSaveWrapper) and not layer.deltas
            active = list(state.routing.names) or sorted(state.merged)
            result.append(
                TunerLayerStatus(
                    name=f"{'model.' * wrapped}{path}{'.token_adapter' * rows}",
                    module_type="TrainableTokensLayer"
                    if rows
                    else "ModulesToSaveWrapper"
                    if saved
                    else f"{kind}.{type(module).__name__}",
                    enabled=bool(state.routing.names or state.merged),
                    active_adapters=[name for name in active if name in own] if saved else active,
                    merged_adapters=[name for name in state.merged if name in own],
                    requires_grad=_together({name: [one.requires_grad for one in held] for name, held in own.items()}),
                    available_adapters=sorted(own),
                    devices={name: sorted({one.device.type for one in held}) for name, held in own.items()},
                    quantization_backend=_BACKENDS.get(type(module).__name__),
                )
            )
    if not result:
        raise LorakitError(
            f"get_layer_status: no adapted layer is on this {type(base).__name__}; prompts, prefixes and the like have none."
        )
    return result


def model_status(base: nn.Module, wrapper: Any) -> TunerModelStatus:
    """Which adapters are on a base, and how they are; `wrapper` is its PeftModel, or None."""
    layers = layer_status(base, wrapper is not None)
    names = sorted(adapters(base))
    total = {id(one): one for one in base.parameters()}.values()
    backends = {one.quantization_backend for one in layers}
    plain = not hasattr(base, "config")

    def of(name: str, field: str) -> list[Any]:
        return [getattr(one, field)[name] for one in layers if name in getattr(one, field)]

    return TunerModelStatus(
        base_model_type="other" if wrapper is None and plain else type(base).__name__,
        adapter_model_type="None" if wrapper is None else type(wrapper.base_model).__name__,
        peft_types={} if wrapper is None else {name: str(one.peft_type) for name, one in wrapper.peft_config.items()},
        trainable_params=sum(one.numel() for one in total if one.requires_grad),
        total_params=sum(one.numel() for one in total),
        num_adapter_layers=len(layers),
        enabled=layers[0].enabled,
        active_adapters=list(state_of(base).routing.names) or sorted(state_of(base).merged),
        merged_adapters=sorted(state_of(base).merged),
        requires_grad=_together({name: of(name, "requires_grad") for name in names}),
        available_adapters=names,
        devices={name: sorted({kind for own in of(name, "devices") for kind in own}) for name in names},
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )
