"""PEFT's names over lorakit, so that a script that uses PEFT's LoRA runs with one import changed.

    from lorakit.peft import LoraConfig, PeftModel, get_peft_model

Every field of PEFT's LoraConfig is accepted. Each is either honoured or refused by name; none is dropped. What differs
from PEFT is deliberate: names that match nothing raise, per-row `adapter_names` works for every layer, switching and
disabling adapters touches no `requires_grad`, and an exception in a forward leaves nothing behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.adapter.attachment import attach, detach
from lorakit.algebra.merging import merge
from lorakit.core.delta import Method
from lorakit.core.state import state_of
from lorakit.core.using import activate, use
from lorakit.core.walking import has_suffix, walk
from lorakit.errors import LorakitError, unknown
from lorakit.files.bundle import read_config
from lorakit.files.formats import spec_from_peft
from lorakit.files.interchange import asked_targets, heads_for
from lorakit.files.store import load

_QUERY_VALUE = {
    (
        "q_proj",
        "v_proj",
    ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("q", "v"): "t5 mt5",
    ("query_key_value",): "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("Wqkv",): "mpt",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
}
DEFAULT_TARGETS = {kind: list(names) for names, kinds in _QUERY_VALUE.items() for kind in kinds.split()}
"""config.model_type -> the layers that are adapted where target_modules is not given."""


@dataclass
class LoraConfig:
    """PEFT's configuration of LoRA, field by field with PEFT's defaults."""

    task_type: str | None = None
    peft_type: str = "LORA"
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: Iterable[str] | str | None = None
    exclude_modules: Iterable[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Iterable[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                # a set has no order, and what is saved must not differ from run to run
                setattr(self, name, sorted(value) if isinstance(value, set | frozenset) else list(value))
        task = self.task_type
        self.task_type = None if task is None else str(getattr(task, "value", task))
        self.peft_type = str(getattr(self.peft_type, "value", self.peft_type))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return asdict(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> Self:
        """The configuration in an adapter folder; `changes` win."""
        values = {**read_config(folder), **changes}
        known = [one.name for one in fields(cls)]
        for name, value in values.items():
            if name not in known and value not in (None, False, {}, [], ""):
                raise unknown("field of LoraConfig", name, known, where=str(folder))
        return cls(**{name: value for name, value in values.items() if name in known})


def _attach(model: nn.Module, config: LoraConfig, name: str) -> Adapter:
    """An adapter as PEFT's configuration describes it; whatever cannot be honoured is refused by its name."""
    options = config.to_dict()
    for option in ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "ensure_weight_tying"):
        if options[option]:
            raise LorakitError(f"LoraConfig: {option}={options[option]!r} is not offered under PEFT's names.")
    if options["init_lora_weights"] not in (True, "gaussian"):
        raise LorakitError(
            f"LoraConfig: init_lora_weights={options['init_lora_weights']!r} is not offered under PEFT's names; True and "
            '"gaussian" are. lk.attach(init=…) has more.'
        )
    if getattr(config.runtime_config, "ephemeral_gpu_offload", False):
        raise LorakitError("LoraConfig: runtime_config.ephemeral_gpu_offload is not offered.")
    targets = config.target_modules
    if targets is None and not config.target_parameters:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULT_TARGETS:
            raise LorakitError(
                f"LoraConfig: target_modules was not given, and there is no default for model_type {kind!r}; "
                '"all-linear" or a list of layer names would work.'
            )
        targets = DEFAULT_TARGETS[kind]
    targets = asked_targets(
        tuple(targets or ()) if not isinstance(targets, str) else targets, config.target_parameters or ()
    )
    saved = list(config.modules_to_save or [])
    paths = [path for path, _ in walk(model)]
    for head in heads_for(config.task_type):
        if head not in saved and any(has_suffix(path, head) for path in paths):
            saved.append(head)
    layers = config.layers_to_transform
    adapter = attach(
        model,
        cast(Method, spec_from_peft(options)),
        name=name,
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        layers=None if layers == [] else layers,
        layers_pattern=config.layers_pattern or None,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        modules_to_save=saved,
        bias=config.bias,
        init="gaussian" if options["init_lora_weights"] == "gaussian" else "default",
    )
    if config.inference_mode:
        adapter.requires_grad_(False)
    return adapter


def get_peft_model(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """A new, trainable adapter on `model`, under PEFT's interface. The model itself gets the adapter too."""
    _attach(model, peft_config, adapter_name)
    return PeftModel(model, {adapter_name: peft_config})


class _Forward:
    """The call of a model with one more argument, under the model's own signature: trainers read from it which columns
    of the data the model takes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return self.model(*args, **kwargs)
        with use(self.model, _rows(adapter_names)):
            return self.model(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.model.forward)


class PeftModel(nn.Module):
    """A model with adapters behind PEFT's interface. Attributes that it lacks are the model's."""

    def __init__(self, model: nn.Module, peft_config: Mapping[str, LoraConfig]) -> None:
        super().__init__()
        self.base_model = model
        self.peft_config = dict(peft_config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
    ) -> PeftModel:
        """Put the adapter in a folder (or on the hub) on `model`."""
        wrapped = cls(model, {})
        wrapped.load_adapter(model_id, adapter_name, is_trainable, revision)
        wrapped.set_adapter(adapter_name)
        return wrapped

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, revision: str | None = None
    ) -> Adapter:
        """Put one more adapter from a folder (or the hub) on the model; the active one stays."""
        adapter = load(
            self.base_model, model_id, name=adapter_name, trainable=is_trainable, revision=revision, active=False
        )
        self.peft_config[adapter_name] = LoraConfig.from_pretrained(model_id)
        return adapter

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Put one more new adapter on the model; the active one stays."""
        before = self._routing()
        _attach(self.base_model, peft_config, adapter_name)
        if before is not None:
            activate(self.base_model, before)
        self.peft_config[adapter_name] = peft_config

    def _routing(self) -> Any:
        return state_of(self.base_model).routing if adapters(self.base_model) else None

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter off."""
        detach(self.base_model, adapter_name)
        self.peft_config.pop(adapter_name, None)

    # -- which adapter acts -------------------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return list(state_of(self.base_model).routing.names)

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that acts now."""
        names = self.active_adapters
        if len(names) != 1:
            raise LorakitError(f"active_adapter: {len(names)} adapters are active: {', '.join(names) or 'none'}.")
        return names[0]

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Let one adapter act, or several added up. No `requires_grad` changes: an adapter that does not act gets no
        gradient anyway."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        activate(self.base_model, dict.fromkeys(names, 1.0))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model."""
        with use(self.base_model, None):
            yield

    # -- calls --------------------------------------------------------------------------------------------------------
    @property
    def forward(self) -> _Forward:  # type: ignore[override]
        """The model's forward; `adapter_names` gives each row of the batch its own, "__base__" for none."""
        return _Forward(self.base_model)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model's generate; `adapter_names` as in `forward`."""
        generate = cast(Any, self.base_model).generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        with use(self.base_model, _rows(adapter_names), copies=copies):
            return generate(*args, **kwargs)

    # -- off and out --------------------------------------------------------------------------------------------------
    def get_base_model(self) -> nn.Module:
        """The model itself, with the adapters on it."""
        return self.base_model

    def unload(self) -> nn.Module:
        """The model without any adapter."""
        return detach(self.base_model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Write the active adapters (or these) into the weights; returns the model without adapters. The values are
        always checked, whatever `safe_merge` says."""
        names = adapter_names or self.active_adapters
        merge(self.base_model, dict.fromkeys(names, 1.0))
        return detach(self.base_model) if adapters(self.base_model) else self.base_model

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, selected_adapters: list[str] | None = None
    ) -> None:
        """Write the adapters: "default" into the folder, others into a sub-folder of their name, as PEFT does."""
        if not safe_serialization:
            raise LorakitError(
                "save_pretrained: safe_serialization=False asks for a pickle; only safetensors is written."
            )
        known = adapters(self.base_model)
        for name in selected_adapters or list(known):
            if name not in known:
                raise unknown("adapter", name, known)
            folder = Path(save_directory)
            config = self.peft_config.get(name)
            known[name].save(
                folder if name == "default" else folder / name,
                base=None if config is None else config.base_model_name_or_path,
            )

    # -- counts -------------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable numbers, and all numbers of model and adapters."""
        own: dict[int, Tensor] = {id(one): one for one in self.base_model.parameters()}
        for adapter in adapters(self.base_model).values():
            own.update({id(one): one for one in adapter.parameters()})
        return sum(one.numel() for one in own.values() if one.requires_grad), sum(one.numel() for one in own.values())

    def print_trainable_parameters(self) -> None:
        """Print how many numbers train."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")


def _rows(names: list[str]) -> list[str | None]:
    return [None if name == "__base__" else name for name in names]


__all__ = ["DEFAULT_TARGETS", "LoraConfig", "PeftModel", "get_peft_model"]
