"""`PeftModel`: a model with adapters behind PEFT's interface, a module that trainers, Accelerate and torch.compile take."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import yaml
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.adapter.attachment import detach
from lorakit.algebra.combining import combine
from lorakit.algebra.merging import merge, merged
from lorakit.core.routing import BASE
from lorakit.core.state import found_state, state_of
from lorakit.core.using import activate, use
from lorakit.core.walking import has_suffix, walk
from lorakit.errors import LorakitError
from lorakit.files.bundle import locate, read_bundle, read_config
from lorakit.files.store import load, refill
from lorakit.peft.attaching import attach_config, set_precision
from lorakit.peft.configs import PEFT_TYPE_TO_CONFIG_MAPPING, AlsoPefts, PeftConfig, PromptLearningConfig
from lorakit.peft.layers import ByAdapter, as_tuner_layers
from lorakit.peft.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from lorakit.train.schedules.ranking import Budget

log = logging.getLogger("lorakit")

_NOT_HERE = {
    "add_weighted_adapters": "add_weighted_adapter",
    "get_prompt": "the adapter's edits: lorakit.adapters(model)[name].edits",
    "get_prompt_embedding_to_save": "save_pretrained",
    "prompt_encoder": "the adapter's edits: lorakit.adapters(model)[name].edits",
    "set_additional_trainable_modules": "modules_to_save in the configuration",
    "subtract_mutated_init": "save_pretrained, which always writes a file for the base as it was",
    "update_layer": "add_adapter",
}
"""Names of PEFT's that the wrapper lacks -> what to use. They must not reach the base model, which may have such a name too."""


class Switches:
    """What PEFT offers alike on its wrapper and on what stands between that and the model."""

    _tuner: Tuner

    # -- which adapter acts -------------------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now, or will where they are switched off for a while."""
        state = found_state(self._tuner.model)
        names = () if state is None else state.routing.names
        return list(names or self._tuner.off)

    @property
    def active_adapter(self) -> Any:
        """The name of the adapter that acts now; as in PEFT a list of names where several do."""
        names = self.active_adapters
        if not names:
            raise LorakitError("active_adapter: no adapter is active.")
        return names[0] if len(names) == 1 else names

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter changes what the model does just now."""
        state = found_state(self._tuner.model)
        return state is not None and bool(state.routing.names or state.merged)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter act, or several added up. As in PEFT these train from now on and others do not, unless
        `inference_mode`; nothing else changes a `requires_grad`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._tuner.named(names)
        self._tuner.let_act(names)
        for name, adapter in adapters(self._tuner.model).items():
            adapter.requires_grad_(name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for adapter in self._tuner.named(names):
            if adapter.edits and isinstance(self._tuner.peft_config[adapter.name], PromptLearningConfig):
                raise TypeError(
                    "Setting `requires_grad` is not supported for prompt learning methods like "
                    f"{self._tuner.peft_config[adapter.name].peft_type}."
                )
            adapter.requires_grad_(requires_grad)

    def disable_adapter_layers(self) -> None:
        """Let no adapter act until `enable_adapter_layers`; what `merge_adapter` wrote is taken out of the weights first."""
        names = tuple(
            self._tuner.off or dict.fromkeys([*sorted(state_of(self._tuner.model).merged), *self.active_adapters])
        )
        self._tuner.merged.close()
        self._tuner.off = names
        activate(self._tuner.model, None)

    def enable_adapter_layers(self) -> None:
        """Let those act again that acted before `disable_adapter_layers`."""
        if self._tuner.off:
            self._tuner.let_act(self._tuner.off)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take adapters off, all or none. Where all that acted go, the first of the others acts now, and the log says which."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        model, known = self._tuner.model, adapters(self._tuner.model)
        for name in names:
            if name not in known:
                raise LorakitError(f"Adapter {name} does not exist; there are: {', '.join(known) or 'none'}.")
        if merged := [name for name in names if name in state_of(model).merged]:
            raise LorakitError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")
        acted = self.active_adapters
        if set(acted).intersection(names):
            off = bool(self._tuner.off)
            left = [name for name in known if name not in names and name not in state_of(model).merged]
            rest = [name for name in acted if name in left] or left[:1]
            self._tuner.let_act(rest)
            if off:
                self.disable_adapter_layers()
            log.warning("delete_adapter: %s acted; %s acts now.", ", ".join(acted), ", ".join(rest) or "no adapter")
        for name in names:
            detach(model, name)
            self._tuner.peft_config.pop(name, None)
        as_tuner_layers(model)

    # -- into the weights and out -------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (the active ones by default) into the weights until `unmerge_adapter`; values are always checked."""
        held = state_of(self._tuner.model).merged
        names = adapter_names or self.active_adapters
        if held.issuperset(names):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        if held:  # one more: the base's bits come back first, so that nothing is rounded twice
            self._tuner.merged.close()
            names = [*held, *(name for name in names if name not in held)]
        with _broken(names):
            self._tuner.merged.enter_context(merged(self._tuner.model, dict.fromkeys(names, 1.0)))

    def unmerge_adapter(self) -> None:
        """Put the very bits of the base back; the adapters act beside it again."""
        if not state_of(self._tuner.model).merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
        self._tuner.merged.close()

    def unload(self) -> nn.Module:
        """The model without any adapter."""
        return detach(self._tuner.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Write the active adapters (or these) into the weights; returns the model without adapters. The values are
        always checked, whatever `safe_merge` says."""
        model = self._tuner.model
        names = adapter_names or sorted(state_of(model).merged) or self.active_adapters
        self._tuner.merged.close()
        with _broken(names):
            merge(model, dict.fromkeys(names, 1.0))
        return detach(model) if adapters(model) else model

    # -- what is there ------------------------------------------------------------------------------------------------
    @property
    def modules_to_save(self) -> set[str] | None:
        """The names that all adapters train whole."""
        own = self._tuner.peft_config.values()
        return {name for one in own for name in getattr(one, "modules_to_save", None) or ()} or None

    @property
    def targeted_module_names(self) -> list[str]:
        """The layers that adapters change."""
        known = adapters(self._tuner.model).values()
        paths = {
            path
            for one in known
            for path, layer in one.layers.items()
            if not all(one.beside(delta) for delta in layer.deltas_of(one.name).values())
        }
        return [path for path, _ in walk(self._tuner.model) if path in paths]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The parameters that adapters change by name, as `target_parameters` asks for them."""
        asked = {
            name for one in self._tuner.peft_config.values() for name in getattr(one, "target_parameters", None) or ()
        }
        own = [
            f"{path}.{site.weight}" if path else site.weight
            for one in adapters(self._tuner.model).values()
            for path, layer in one.layers.items()
            for site in layer.sites.values()
        ]
        return [name for name in dict.fromkeys(own) if any(has_suffix(name, one) for one in asked)]


@contextmanager
def _broken(names: Sequence[str]) -> Iterator[None]:
    """Says of numbers that are not finite which adapter has them, as PEFT does."""
    try:
        yield
    except LorakitError as error:
        if "nan" not in str(error).lower() and "finite" not in str(error):
            raise
        raise LorakitError(
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: {error}"
        ) from error


class Tuner(Switches, nn.Module):
    """What PEFT has between its wrapper and the model: `wrapper.base_model.model` is the model."""

    uses_shared_state = False
    """Every method can be put on a model without a wrapper."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.off: tuple[str, ...] = ()
        """The adapters that are switched off for a while."""
        self.merged = ExitStack()
        self.schedules: dict[str, Any] = {}
        """The schedules of AdaLoRA that `update_and_allocate` moves ranks by."""
        given = peft_config if isinstance(peft_config, Mapping) else {adapter_name: peft_config}
        for name, config in given.items():
            if config is not None:
                self.add(name, config, empty=low_cpu_mem_usage)

    def add(self, name: str, config: PeftConfig, full: bool = True, empty: bool = False) -> None:
        """Put one more new adapter on the model; the active one stays, and the first one acts. `empty`: on the meta device."""
        state = found_state(self.model)
        before = state.routing if state is not None and self.peft_config else None
        if name in adapters(self.model):
            raise LorakitError(f"Adapter with name {name!r} already exists. Delete it first, or use another name.")
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.model, "name_or_path", None) or None
        adapter = attach_config(self.model, config, name)
        set_precision(adapter, full)
        for _, _, delta in adapter.deltas() if empty else ():
            delta.to("meta")
        if before is not None:
            state_of(self.model).routing = before
            adapter.requires_grad_(False)  # until set_adapter, as in PEFT
        self.note(name, config)

    def note(self, name: str, config: PeftConfig) -> None:
        """Remember an adapter's configuration; the first one says which class this is."""
        if not self.peft_config and type(self) is Tuner:
            self.__class__ = TUNERS.get(str(config.peft_type), Tuner)
        self.peft_config[name] = config
        if config.peft_type == "ADALORA" and not self._forward_hooks:
            self.register_forward_hook(_penalty)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a dict."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        if hasattr(config, "to_dict"):
            return cast("dict[str, Any]", config.to_dict())
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # type: ignore[arg-type]

    @property
    def _tuner(self) -> Tuner:  # type: ignore[override]
        return self

    @property
    def prefix(self) -> str:
        """What the names of the adapters' parameters have in them."""
        known = list(adapters(self.model).values())
        if known and all(one.edits for one in known):
            if any(isinstance(self.peft_config.get(one.name), PromptLearningConfig) for one in known):
                raise AttributeError("prefix: soft prompts have none.")
            return "lorakit_edits."
        return "deltas."

    def let_act(self, names: Sequence[str]) -> None:
        """Let these adapters act, added up."""
        self.off = ()
        state = state_of(self.model)
        if names:
            state.set(dict.fromkeys(names, 1.0))
        else:  # what is merged stays so
            state.routing, state.decided = BASE, True

    def named(self, names: Sequence[str]) -> list[Adapter]:
        """The adapters of these names."""
        known = adapters(self.model)
        missing = [name for name in names if name not in known]
        if missing:
            raise LorakitError(f"Adapter(s) {missing} not found, available adapters: {sorted(known)}")
        return [known[name] for name in names]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name in _NOT_HERE or name == "prefix":
                raise
            own = ByAdapter(
                lambda: adapters(self.model),
                lambda adapter: adapters(self.model)[adapter].pool.state_dict(keep_vars=True).get(name),
            )  # what all layers share, such as VeRA's projections
            return own if own else getattr(self.model, name)


class MixedModel(Tuner):
    """PEFT's name of it where adapters are of several methods."""


class _Ranks(Tuner):
    """AdaLoRA's, whose ranks are moved by the loop that trains."""

    def update_and_allocate(self, global_step: int) -> None:
        """After an optimiser step and before `zero_grad`: note how much each triplet matters, and keep the best of them."""
        for adapter in self.named(self.active_adapters):
            config: Any = self.peft_config[adapter.name]
            if config.peft_type != "ADALORA":
                continue
            if adapter.name not in self.schedules:
                if not config.total_step:
                    raise LorakitError("AdaLoraConfig: total_step is None; the number of the run's steps is needed.")
                deltas: Any = {
                    site.place(path): delta for path, site, delta in adapter.deltas() if not adapter.beside(delta)
                }
                self.schedules[adapter.name] = Budget(adapter.method, deltas, seed=0)
                self.schedules[adapter.name].begin(config.total_step)
            schedule: Any = self.schedules[adapter.name]
            schedule.before_update(global_step, None)
            schedule.after_update(global_step, None)


@cache
def _tuner_class(config: type) -> type[Tuner]:
    """The class for a configuration: LoraModel for LoraConfig."""
    above = config.__mro__[1]
    bases: tuple[type[Tuner], ...] = (Tuner,) if above is PeftConfig else (_tuner_class(above),)
    name = f"{config.__name__.removesuffix('Config')}Model"
    bases = (_Ranks, *bases) if name == "AdaLoraModel" else bases
    return type(
        name, bases, {"__module__": __name__, "__doc__": f"What is between the wrapper and the model. {config.__doc__}"}
    )


TUNERS: dict[str, type[Tuner]] = {
    kind: _tuner_class(config)
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if not issubclass(config, PromptLearningConfig)
}
"""PEFT type -> the class between the wrapper and the model."""
globals().update({one.__name__: one for one in TUNERS.values()})  # where they are looked for when a model is unpickled


def _penalty(tuner: Any, args: Any, output: Any) -> Any:
    """After a call: AdaLoRA's share of the loss, how far the factors of the adapters that act are from orthonormal ones."""
    loss, known = getattr(output, "loss", None), adapters(tuner.model)
    for name in state_of(tuner.model).routing.names if loss is not None else ():
        deltas: list[Any] = [delta for _, _, delta in known[name].deltas()]
        if known[name].method.name == "adalora":
            squares = [square for own in deltas for square in (own.Q @ own.Q.T, own.P.T @ own.P)]
            apart = [torch.linalg.matrix_norm(one - torch.eye(len(one)).to(one)) for one in squares]
            output.loss = loss = loss + known[name].method.orthogonality * torch.stack(apart).mean()
    return output


_CARD = "\n# Adapter\n\nMade with lorakit; `peft.PeftModel.from_pretrained` and `lorakit.load` read it.\n"
_OF_DEVICES_AND_HUB = frozenset(
    {
        "torch_device",
        "device_map",
        "max_memory",
        "offload_folder",
        "offload_dir",
        "offload_index",
        "key_mapping",
        "token",
    }
    | {
        "cache_dir",
        "use_safetensors",
        "force_download",
        "local_files_only",
        "ignore_mismatched_sizes",
        "use_auth_token",
    }
)


def _folder(model_id: str | Path, subfolder: str | None, revision: str | None) -> Path:
    return locate(Path(model_id) / subfolder if subfolder else model_id, revision)


def _differ(one: PeftConfig, other: PeftConfig) -> bool:
    """Whether two configurations say something else of the layers."""
    left, right = one.to_dict(), other.to_dict()
    said = set(left) - {
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
        "task_type",
    }
    return type(one) is not type(other) or any(left[name] != right[name] for name in said)


_SIGNED: dict[tuple[type, type], Any] = {}


def _signed(cls: type[PeftModel], model: type[nn.Module]) -> Any:
    """The wrapper with a forward that has the model's signature: trainers read from it which columns of the data count."""
    if (cls, model) not in _SIGNED:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        own = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _SIGNED[cls, model] = type(cls.__name__, (cls,), own)
    return _SIGNED[cls, model]


class PeftModel(AlsoPefts, Switches, nn.Module):
    """A model with adapters behind PEFT's interface. Attributes that PEFT has not either are the model's."""

    between: ClassVar[type[Tuner]] = Tuner
    """What stands between this and the model."""

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        """An instance whose forward has the signature of this model's."""
        return cast(PeftModel, nn.Module.__new__(_signed(cls, type(model))))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.base_model = self.between(model)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    @property
    def _tuner(self) -> Tuner:  # type: ignore[override]
        return self.base_model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations by adapter."""
        return self.base_model.peft_config

    @property
    def prefix(self) -> str:
        """What the names of the adapters' parameters have in them."""
        return self.base_model.prefix

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class under its own name, since that with the model's signature has none."""
        return _empty, (type(self).__mro__[1], type(self.base_model.model)), self.__dict__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name in _NOT_HERE:
                raise AttributeError(
                    f"{type(self).__name__}.{name} is not offered; in lorakit it is {_NOT_HERE[name]}."
                ) from None
            held = self.base_model.peft_config.values()
            if held and all(isinstance(one, PromptLearningConfig) for one in held):
                return getattr(self.base_model.model, name)  # PEFT has nothing between the two for soft prompts
            return getattr(self.base_model, name)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> PeftModel:
        """Put the adapter in a folder (or on the hub) on `model`, in evaluation mode unless it is to be trained.

        `options` are those of `load_adapter`.
        """
        if ephemeral_gpu_offload:
            raise LorakitError("from_pretrained: ephemeral_gpu_offload is not offered.")
        folder = _folder(model_id, options.get("subfolder"), revision)
        task = read_config(folder).get("task_type") if config is None else config.task_type
        wrapped = _class_for(cls, task)(model, None)
        options.pop("subfolder", None)
        wrapped.load_adapter(
            folder, adapter_name, is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, config=config, **options
        )
        wrapped.set_adapter(adapter_name, inference_mode=not is_trainable)
        return wrapped

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        revision: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        config: PeftConfig | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> Any:
        """Put one more adapter from a folder (or the hub) on the model; the active one stays. Into an adapter that is there
        already under this name the folder's numbers are put in place, so that an optimiser keeps its parameters.

        Where the model lies decides where the adapter does, so PEFT's options for devices and for the hub have no use here.
        """
        unused = sorted(set(options) - _OF_DEVICES_AND_HUB)
        if unused:
            raise TypeError(f"load_adapter() got an unexpected keyword argument {unused[0]!r}")
        model, known = self.base_model.model, adapters(self.base_model.model)
        folder = _folder(model_id, subfolder, revision)
        bundle = read_bundle(folder)
        if adapter_name not in known:
            read = PeftConfig.from_peft_type(**bundle.config, where=str(model_id))
            if config is None or not _differ(config, read):
                adapter = load(model, folder, name=adapter_name, trainable=is_trainable, active=False)
            else:
                before = self.active_adapters
                adapter = attach_config(model, config, adapter_name)
                self.base_model.let_act(before)
                refill(adapter, bundle)
                adapter.requires_grad_(is_trainable)
            config = config or read
            config.inference_mode = not is_trainable
            self.base_model.note(adapter_name, config)
            as_tuner_layers(model)
            set_precision(adapter, autocast_adapter_dtype)
        elif known[adapter_name].edits:
            twin = load(model, folder, name=f"{adapter_name}-read", active=False)
            try:
                known[adapter_name].load_state_dict(twin.state_dict())
            finally:
                detach(model, twin.name)
        else:
            refill(known[adapter_name], bundle)
        if not is_trainable:
            self.eval()
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put one more new adapter on the model; the active one stays."""
        self.base_model.add(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """One more adapter, the weighted sum of others: of what they add to the weights, not of their factors, so that
        scales, rsLoRA and ranks that differ come out right where PEFT's "linear" does not."""
        how = combination_type.removesuffix("_svd").replace("_", "-")
        if svd_clamp is not None or majority_sign_method != "total":
            raise LorakitError("add_weighted_adapter: svd_clamp and majority_sign_method are not offered.")
        known = self.base_model.named(adapters)
        largest = max(getattr(one.method, "rank", 0) for one in known)
        options: dict[str, Any] = {} if density is None else {"density": density}
        if how not in ("linear", "cat"):
            options["rank"] = svd_rank or largest
        combine(known, weights, how, name=adapter_name, **options)
        rank = getattr(self.base_model.named([adapter_name])[0].method, "rank", largest)
        self.peft_config[adapter_name] = dataclasses.replace(cast(Any, self.peft_config[adapters[0]]), r=rank)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the adapter that acts now."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> Any:
        """PEFT's name of the active adapter's method."""
        return self.active_peft_config.peft_type

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model, also where adapters are merged."""
        tuner = self.base_model
        state = state_of(tuner.model)
        names = sorted(state.merged)
        tuner.merged.close()
        if state.merged:
            raise LorakitError(
                f"disable_adapter: {min(state.merged)!r} is merged into the weights by lorakit.merged; leave that block first."
            )
        before, off = state.routing, tuner.off
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if not state.routing.names:  # else set_adapter was called within the block, and what it chose stays
                tuner.off = off
                activate(tuner.model, before)
            if names:
                self.merge_adapter(names)

    # -- calls --------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward; `adapter_names` gives each row of the batch its own, "__base__" for none."""
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        with use(self.base_model.model, _rows(adapter_names)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model's generate; `adapter_names` as in `forward`."""
        generate = cast(Any, self.base_model.model).generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        with use(self.base_model.model, _rows(adapter_names), copies=copies):
            return generate(*args, **kwargs)

    # -- off and out --------------------------------------------------------------------------------------------------
    def get_base_model(self) -> nn.Module:
        """The model itself, with the adapters on it."""
        return self.base_model.model

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters: "default" into the folder, others into a sub-folder of their name, as PEFT does.

        Files always belong to the base as it was before any start changed it. `state_dict` is not needed: each adapter knows
        its tensors.
        """
        if not safe_serialization:
            raise LorakitError(
                "save_pretrained: safe_serialization=False asks for a pickle; only safetensors is written."
            )
        if save_embedding_layers is True:
            raise LorakitError(
                "save_pretrained: save_embedding_layers=True: name the embedding in modules_to_save to have it in the file."
            )
        names = selected_adapters or list(adapters(self.base_model.model))
        for adapter in self.base_model.named(names):
            folder = Path(save_directory)
            config = self.peft_config.get(adapter.name)
            if is_main_process:
                adapter.save(
                    folder if adapter.name == "default" else folder / adapter.name,
                    base=None if config is None else config.base_model_name_or_path,
                )
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """README.md with the entries by which the hub knows an adapter; those of one that is there stay."""
        path = Path(output_dir) / "README.md"
        old = path.read_text() if path.exists() else ""
        _, head, text = old.split("---\n", 2) if old.startswith("---\n") and old.count("---\n") > 1 else ("", "", old)
        entries = yaml.safe_load(head) or {}
        config: Any = getattr(self.base_model.model, "config", None) or {}
        base = (config.to_dict() if hasattr(config, "to_dict") else config).get("_name_or_path")
        tags = {*entries.get("tags", ()), "lorakit", *(str(one.peft_type).lower() for one in self.peft_config.values())}
        entries |= {"library_name": "peft", "tags": sorted(tags)} | ({"base_model": base} if base else {})
        path.write_text(f"---\n{yaml.safe_dump(entries)}---\n{text or _CARD}")

    def push_to_hub(
        self, repo_id: str, *, commit_message: str = "Upload adapter", private: bool | None = None, **options: Any
    ) -> Any:
        """Upload the adapters, never the base, into a repository of the hub."""
        from huggingface_hub import HfApi

        hub = HfApi(token=options.pop("token", None))
        repository = hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message, **options
            )

    # -- what PEFT's trainers ask -------------------------------------------------------------------------------------
    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Inputs that require gradients, without which re-entrant checkpoints compute none."""
        self.enable_input_require_grads()
        return model

    @property
    def base_model_torch_dtype(self) -> Any:
        """The dtype of the base model."""
        return getattr(self.base_model.model, "dtype", None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes the adapter: any that adds something to weights."""
        return not self.base_model.named([adapter_name])[0].edits

    def get_model_status(self) -> TunerModelStatus:
        """Which adapters are on the model, and how they are."""
        self._has_layers("get_model_status")
        return model_status(self.base_model.model, self)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The adapters of each adapted layer."""
        self._has_layers("get_layer_status")
        return layer_status(self.base_model.model, wrapped=True)

    def _has_layers(self, what: str) -> None:
        if all(one.edits for one in adapters(self.base_model.model).values()):
            raise TypeError(
                f"{what}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported: they change "
                "no layer."
            )

    # -- counts -------------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable numbers, and all numbers of model and adapters."""
        own: dict[int, Tensor] = {id(one): one for one in self.base_model.parameters()}
        for adapter in adapters(self.base_model.model).values():
            own.update({id(one): one for one in adapter.parameters()})
        return sum(one.numel() for one in own.values() if one.requires_grad), sum(one.numel() for one in own.values())

    def print_trainable_parameters(self) -> None:
        """Print how many numbers train."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")


def _empty(cls: type[PeftModel], model: type[nn.Module]) -> PeftModel:
    return cast(PeftModel, nn.Module.__new__(_signed(cls, model)))


def _rows(names: list[str]) -> list[str | None]:
    return [None if name == "__base__" else name for name in names]


class PeftMixedModel(PeftModel):
    """The same: adapters of different methods act together on any model here."""

    between = MixedModel

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """As of a PeftModel, but for soft prompts."""
        if peft_config.is_prompt_learning:
            raise LorakitError(
                f"The provided `peft_type` '{peft_config.peft_type}' is not compatible with the `PeftMixedModel`."
            )
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)


class PeftModelForCausalLM(PeftModel):
    """PEFT's name where the task is CAUSAL_LM."""


class PeftModelForSeq2SeqLM(PeftModel):
    """PEFT's name where the task is SEQ_2_SEQ_LM."""


class PeftModelForSequenceClassification(PeftModel):
    """PEFT's name where the task is SEQ_CLS."""


class PeftModelForTokenClassification(PeftModel):
    """PEFT's name where the task is TOKEN_CLS."""


class PeftModelForQuestionAnswering(PeftModel):
    """PEFT's name where the task is QUESTION_ANS."""


class PeftModelForFeatureExtraction(PeftModel):
    """PEFT's name where the task is FEATURE_EXTRACTION."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _class_for(cls: type[PeftModel], task: str | None) -> type[PeftModel]:
    """The class for a task, where none of them was asked for by name."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(task), cls) if cls is PeftModel else cls


def _bare(model: nn.Module, name: str) -> nn.Module:
    """The model for a new adapter: without its wrapper, and without an earlier adapter of this name."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if found_state(base) is None:
        return base
    warnings.warn(
        "You are trying to modify a model with PEFT for a second time. The adapters that are on it stay, but for one of the "
        "same name, which is replaced; `.unload()` takes all off, and `.add_adapter(name, config)` adds one more.",
        stacklevel=3,
    )
    if name in adapters(base) and not isinstance(model, PeftModel):
        detach(base, name)
    return base


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A new, trainable adapter on `model`, under PEFT's interface. The model itself gets the adapter too.

    Args:
        model: any torch model.
        peft_config: what to train.
        adapter_name: of the adapter on the model.
        mixed: whether the result calls itself PeftMixedModel; adapters of several methods act together anyway.
        autocast_adapter_dtype: keep the adapter in float32 where the base is float16 or bfloat16.
        revision: of the base model, for the configuration.
        low_cpu_mem_usage: the adapter's tensors on the meta device, until `set_peft_model_state_dict` fills them.
    """
    if revision is not None:
        peft_config.revision = revision
    model = _bare(model, adapter_name)
    made = PeftMixedModel if mixed else _class_for(PeftModel, peft_config.task_type)
    return made(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
