"""Adapted layers as PEFT's users see them: classes by method, PEFT's names of their tensors, switches layer by layer.

There is one kind of adapted layer, `core.layer.Adapted`, whatever it holds. Its class is exchanged for one of these, so that
`isinstance(module, LoraLayer)` and `module.lora_A["default"].weight` are what they are in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from lorakit.adapter.adapter import adapters
from lorakit.adapter.attachment import detach
from lorakit.core.delta import Delta
from lorakit.core.layer import Adapted
from lorakit.files.formats import format_of
from lorakit.files.packing import names_of, pack
from lorakit.methods.tokens import TokenRows
from lorakit.peft.configs import CONFIGS, LoraConfig, PeftConfig, PromptLearningConfig

_AS_LAYERS = frozenset({"lora_magnitude_vector"})
"""What PEFT has as a small layer, and its files without the layer's word."""


class ByAdapter(Mapping[str, Any]):
    """Adapter -> something of it in one layer, as it is now; an adapter that was taken off is not there any more."""

    def __init__(self, names: Callable[[], Any], value: Callable[[str], Any]) -> None:
        self._names, self._value = names, value

    def __getitem__(self, adapter: str) -> Any:
        if adapter not in self._names():
            raise KeyError(adapter)
        value = self._value(adapter)
        if value is None:
            raise KeyError(adapter)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names() if self._value(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self:
            return self[name]
        raise AttributeError(name)


class Factor(nn.Module):
    """What PEFT has as a small layer, such as `lora_A["default"]`: its tensors are the adapter's own, also where one is set."""

    def __init__(self, delta: Delta, letters: Mapping[str, str], shown: Mapping[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(_delta=delta, _letters=dict(letters))
        self._parameters["bias"] = None
        for name, tensor in shown.items():
            held: dict[str, Any] = self._parameters if isinstance(tensor, nn.Parameter) else self._buffers
            held[name] = tensor

    def __setattr__(self, name: str, value: Any) -> None:
        letters = self.__dict__.get("_letters", {})
        if name in letters:
            setattr(self.__dict__["_delta"], letters[name], value)
        super().__setattr__(name, value)


class LinearFactor(Factor, nn.Linear):
    """One that is a matrix, which PEFT has as a linear layer."""

    def __init__(self, delta: Delta, letters: Mapping[str, str], shown: Mapping[str, Tensor]) -> None:
        Factor.__init__(self, delta, letters, shown)
        self.__dict__.update(in_features=shown["weight"].shape[1], out_features=shown["weight"].shape[0])


class _Switched(Adapted):
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
        return [name for name in self.state.merged if name in self._here()]

    @property
    def merged(self) -> bool:
        """Whether any adapter is in this layer's weights just now."""
        return bool(self.merged_adapters)

    def _here(self) -> list[str]:
        return list(dict.fromkeys([*self.deltas, *self.replacements]))

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._here())

    def _get_available_adapters(self) -> set[str]:
        return set(self._here())

    @property
    def base_layer(self) -> nn.Module:
        """The layer as it was."""
        return self.base

    def get_base_layer(self) -> nn.Module:
        """The layer as it was."""
        return self.base

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return list(self.state.routing.names)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the adapters that act now."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether none acts."""
        return not self.state.routing.names


class _Rows(_Switched):
    """A table of which some adapter trains rows alone."""

    def _rows(self, value: Callable[[TokenRows], Any]) -> ByAdapter:
        return ByAdapter(
            lambda: self.deltas,
            lambda name: next(
                (value(one) for one in self.deltas_of(name).values() if isinstance(one, TokenRows)), None
            ),
        )

    @property
    def token_indices(self) -> ByAdapter:
        """The rows that train."""
        return self._rows(lambda delta: list(delta.spec.tokens))

    @property
    def trainable_tokens_delta(self) -> ByAdapter:
        """The rows themselves."""
        return self._rows(TokenRows.rows)

    @property
    def trainable_tokens_original(self) -> ByAdapter:
        """The base's own rows."""

        def rows(delta: TokenRows) -> Tensor:
            (site,) = self.sites.values()
            return self.stored(site)[delta.index]

        return self._rows(rows)


class BaseTunerLayer(_Switched):
    """A layer that adapters change."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = ByAdapter(lambda: self.deltas, lambda adapter: self._named(adapter, name))
            if name.startswith("_") or not found:
                raise
            return found

    def _named(self, adapter: str, name: str) -> Any:
        """An adapter's tensors under a name of PEFT's files: one tensor, or a small layer of them; None where there is none."""
        for key, whole in self.deltas_of(adapter).items():
            layout = self.sites[key].layout
            for delta in filter(None, (whole, cast(Any, getattr(whole, "inner", None)))):  # DoRA's, and a start's
                letters: dict[str, str] = {}
                shown: dict[str, Tensor] = {}
                for letter, (path, axes) in names_of(delta, layout.kind).items():
                    first, _, rest = f"{path}.weight".partition(".") if path in _AS_LAYERS else path.partition(".")
                    tensor = getattr(delta, letter, None)
                    if first != name or tensor is None:
                        continue
                    packed = pack(layout, tensor, axes)
                    shown[rest] = tensor if packed.shape == tensor.shape else packed
                    letters[rest] = letter
                if "" in shown:
                    return shown[""]
                if shown:
                    matrix = isinstance(shown.get("weight"), nn.Parameter) and shown["weight"].ndim == 2
                    return (LinearFactor if matrix else Factor)(delta, letters, shown)
        return None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight."""
        (delta,), (site,) = self.deltas_of(adapter).values(), self.sites.values()
        W = self.stored(site)
        return site.layout.weight(delta.dense(site.layout.matrix(W)), W)

    def _of_deltas(self, value: Callable[[Any], Any]) -> ByAdapter:
        return ByAdapter(
            lambda: self.deltas,
            lambda name: next((value(getattr(one, "inner", one)) for one in self.deltas_of(name).values()), None),
        )

    @property
    def scaling(self) -> ByAdapter:
        """The scale of each adapter."""
        return self._of_deltas(lambda delta: getattr(delta, "scale", None))

    @property
    def r(self) -> ByAdapter:
        """The rank of each adapter."""
        return self._of_deltas(lambda delta: getattr(delta.spec, "rank", None))

    @property
    def in_features(self) -> int:
        """Inputs of the base, channels and rows of an embedding among them."""
        return self._first("in_features", "in_channels", "num_embeddings", "nx", "embed_dim", "normalized_shape")

    @property
    def out_features(self) -> int:
        """Outputs of the base."""
        return self._first("out_features", "out_channels", "embedding_dim", "nf", "embed_dim", "normalized_shape")

    def _first(self, *names: str) -> int:
        found = next((getattr(self.base, name) for name in names if hasattr(self.base, name)), None)
        if found is None:
            raise AttributeError(f"{type(self.base).__name__} has none of {', '.join(names)}")
        return math.prod(found) if isinstance(found, tuple) else cast(int, found)


class AuxiliaryTrainingWrapper(_Switched):
    """A layer of which some adapter trains more than a change: the whole module, or rows of it."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters of this layer that act now."""
        here = self._here()
        return [name for name in self.state.routing.names if name in here]


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that some adapter replaces whole: `modules_to_save["default"].weight` is the adapter's own."""

    @property
    def replacements(self) -> Any:  # type: ignore[override]
        """What adapters replace, under the name that it has among this layer's parameters."""
        return self._modules["modules_to_save"]

    @property
    def original_module(self) -> nn.Module:
        """The module as it was."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        """What a model that reads this module's tensors gets: those of the adapter that acts, where one acts here."""
        active = self.active_adapters if name in cast(nn.Module, self._modules["base"])._parameters else []
        own = self.replaced_by(active[0]) if len(active) == 1 else {}
        return own[name] if name in own else super().__getattr__(name)


class TrainableTokensWrapper(_Rows, AuxiliaryTrainingWrapper):
    """A table of which some adapter trains rows beside what it changes elsewhere."""

    @property
    def token_adapter(self) -> TrainableTokensWrapper:
        """PEFT has the rows in a layer of its own; here it is this one."""
        return self


@cache
def _layer(config: type) -> type[BaseTunerLayer]:
    """The class of layers that a configuration's adapters change: LoraLayer of LoraConfig."""
    above = config.__mro__[1]
    base = BaseTunerLayer if above is PeftConfig else _layer(above)
    bases = (_Rows, base) if config.__name__ == "TrainableTokensConfig" else (base,)
    name = f"{config.__name__.removesuffix('Config')}Layer"
    return type(name, bases, {"__module__": __name__, "__doc__": f"{config.__doc__} A layer of it."})


LAYERS: dict[str, type[BaseTunerLayer]] = {
    one.__name__: one
    for config in (LoraConfig, *CONFIGS.values())
    if issubclass(config, PeftConfig) and not issubclass(config, PromptLearningConfig)
    for one in [_layer(config)]
}
"""Name of the class -> the class of the layers of one PEFT type."""
_PLAIN = {one.__name__: one for one in (BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)}
_CONFIG_OF = {
    config.__dataclass_fields__["peft_type"].default: config
    for config in (LoraConfig, *CONFIGS.values())
    if issubclass(config, PeftConfig)
}


@cache
def _joined(names: tuple[str, ...]) -> Any:
    """The class of a layer that is all of these."""
    known = {**LAYERS, **_PLAIN}
    bases = tuple(known[name] for name in names)
    # a class that is above another one here is left out: LoraLayer where AdaLoraLayer is
    bases = tuple(one for one in bases if not any(other is not one and issubclass(other, one) for other in bases))
    return bases[0] if len(bases) == 1 else type("_".join(names), bases, {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """The classes by name; those of layers that are several, such as LoraLayer_LoHaLayer, so that such a layer is unpickled."""
    names = name.split("_")
    if all(one in LAYERS or one in _PLAIN for one in names):
        return _joined(tuple(names))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def as_tuner_layers(model: nn.Module) -> None:
    """Give the adapted layers of a model the classes of what they hold."""
    found: dict[int, tuple[Any, set[str]]] = {}
    for adapter in adapters(model).values():
        config = _CONFIG_OF.get(format_of(adapter.method.name).peft)
        own = "BaseTunerLayer" if config is None else _layer(config).__name__
        saved = frozenset(() if getattr(adapter.method, "whole", False) else adapter.saved)
        for path, layer in adapter.layers.items():
            _, names = found.setdefault(id(layer), (layer, set()))
            beside = [adapter.beside(delta) for delta in layer.deltas_of(adapter.name).values()]
            if path in saved:
                names.add("ModulesToSaveWrapper")
            if any(beside):
                names.add("TrainableTokensWrapper")
            if not all(beside) or (not beside and path not in saved):
                names.add(own)
    for layer, names in found.values():
        layer.__class__ = _joined(tuple(sorted(names)))
        # under this name the parameters of a module that is saved whole are known in PEFT
        held = (
            layer._modules.pop("replacements")
            if "replacements" in layer._modules
            else layer._modules.pop("modules_to_save")
        )
        layer._modules["modules_to_save" if isinstance(layer, ModulesToSaveWrapper) else "replacements"] = held
