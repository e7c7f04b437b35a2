"""PEFT's functions over a model that is wrapped or carries adapters."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.adapter.attachment import detach
from lorakit.adapter.pretrained import is_ours
from lorakit.algebra.resizing import resize
from lorakit.algebra.swapping import swap
from lorakit.core.state import state_of
from lorakit.core.using import activate, use
from lorakit.core.walking import walk
from lorakit.errors import LorakitError, unknown
from lorakit.files.bundle import read_tensors
from lorakit.files.filling import fill
from lorakit.files.formats import format_of
from lorakit.files.interchange import PREFIX, config_of, names_in, plain_names, tensors_of
from lorakit.optim.groups import parameter_groups
from lorakit.peft.attaching import attach_config, eva_start, layers_asked, set_precision
from lorakit.peft.configs import PeftConfig
from lorakit.peft.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from lorakit.peft.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from lorakit.peft.targets import feedforward_targets


def _base(model: nn.Module) -> nn.Module:
    return model.base_model.model if isinstance(model, PeftModel) else model


def _adapter(model: nn.Module, name: str) -> Adapter:
    known = adapters(_base(model))
    if name not in known:
        raise unknown("adapter", name, known)
    return known[name]


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A new adapter on the model itself, without a wrapper.

    With `state_dict`, tensors under the names of PEFT's files, the layers that it has are adapted, whatever the configuration
    says; nothing is loaded yet. `low_cpu_mem_usage` leaves the adapter's tensors on the meta device until they are.
    """
    config = peft_config if state_dict is None else _as_in(model, peft_config, state_dict)
    adapter = attach_config(model, config, adapter_name)
    for _, _, delta in adapter.deltas() if low_cpu_mem_usage else ():
        delta.to("meta")
    cast(Any, model).peft_config = {**getattr(model, "peft_config", {}), adapter_name: peft_config}
    return model


def _as_in(model: nn.Module, config: PeftConfig, state: Mapping[str, Tensor]) -> PeftConfig:
    """The configuration with the layers that a state dict has; a warning where it asks for others."""
    if getattr(config, "target_parameters", None):
        raise LorakitError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`: the names in the "
            "state dict do not tell a parameter from a layer. Leave state_dict out."
        )
    plain = plain_names(model)
    paths = {name: path for path, name in plain.items() if path}
    names: set[str] = set()
    for key in names_in(state, plain, "state_dict"):
        steps = key.split(".")
        place = next((".".join(steps[:n]) for n in range(len(steps) - 1, 0, -1) if ".".join(steps[:n]) in paths), None)
        if place is not None and key.removeprefix(place) not in (".weight", ".bias"):
            names.add(paths[place])
    asked = set(layers_asked(model, config))
    for more, less, whose in (asked, names, "PEFT config"), (names, asked, "state_dict"):
        if more - less:
            warnings.warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
                "state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
                f"The {whose} contained these additional target modules: {sorted(more - less)}. ",
                RuntimeWarning,
                stacklevel=3,
            )
    changed: dict[str, Any] = {"target_modules": sorted(names), "exclude_modules": None, "layers_to_transform": None}
    if config.peft_type == "IA3" and getattr(config, "target_modules", None) is None:
        changed["feedforward_modules"] = feedforward_targets(
            getattr(getattr(model, "config", None), "model_type", None)
        )
    known = {one.name for one in dataclasses.fields(cast(Any, config))}
    return cast(
        PeftConfig,
        dataclasses.replace(cast(Any, config), **{key: value for key, value in changed.items() if key in known}),
    )


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "") -> None:
    """Take an adapter off the model itself."""
    detach(_base(model), adapter_name)
    if isinstance(getattr(model, "peft_config", None), dict):
        cast(Any, model).peft_config.pop(adapter_name, None)


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **_: Any
) -> dict[str, Tensor]:
    """The adapter's tensors under the names of PEFT's files; without their prefix where the model is not wrapped."""
    tensors = tensors_of(_adapter(model, adapter_name))
    return tensors if isinstance(model, PeftModel) else {key.removeprefix(PREFIX): one for key, one in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", **_: Any
) -> Any:
    """Put tensors under the names of PEFT's files into an adapter, in place. LorakitError where one lacks or is left over."""
    adapter = _adapter(model, adapter_name)
    if adapter.edits:
        raise LorakitError(
            f"set_peft_model_state_dict: {adapter_name!r} is {adapter.method.name}, which is read from its folder by "
            "load_adapter."
        )
    plain, where = plain_names(adapter.model), Path("peft_model_state_dict")
    for path, _site, delta in adapter.deltas():
        if any(one.is_meta for one in delta.parameters()):
            delta.to_empty(device=next(adapter.layers[path].base.parameters()).device)

    def refuse(message: str) -> None:
        raise LorakitError(message)

    named = _without_biases(adapter, names_in(peft_model_state_dict, plain, where), plain)
    fill(adapter, format_of(adapter.method.name).from_file(adapter.method, named, {}, ()), plain, where, refuse)
    return torch.nn.modules.module._IncompatibleKeys([], [])


def _without_biases(adapter: Adapter, named: dict[str, Tensor], plain: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors without those biases that this adapter does not train; as in PEFT the base takes them."""
    own = {f"{plain[path]}.{name}" for path, replacement in adapter.replacements() for name in replacement.names}
    base: dict[str, Tensor] = {
        f"{plain[path]}.bias": cast(Tensor, module.bias)
        for path, module in walk(adapter.model)
        if path in plain and isinstance(getattr(module, "bias", None), Tensor)
    }
    rest = {}
    for key, tensor in named.items():
        name = key.replace(".base_layer.", ".")
        if name in base and name not in own:
            with torch.no_grad():
                base[name].copy_(tensor)
        else:
            rest[key] = tensor
    return rest


def load_peft_weights(model_id: str | Path, device: str | None = None, **_: Any) -> dict[str, Tensor]:
    """The tensors of an adapter folder."""
    return {key: one if device is None else one.to(device) for key, one in read_tensors(model_id).items()}


def initialize_lora_eva_weights(
    model: nn.Module, dataloader: Iterable[Any] | None = None, adapter_name: str = "default", **_: Any
) -> None:
    """Start an adapter of init_lora_weights="eva" anew from data: its parameters are new ones, so make optimisers later."""
    if not isinstance(model, PeftModel) or dataloader is None:
        raise LorakitError("initialize_lora_eva_weights: a model of get_peft_model and a dataloader are needed.")
    config, base = model.peft_config[adapter_name], model.base_model.model
    start, batches = eva_start(config, dataloader)
    routing = state_of(base).routing
    detach(base, adapter_name)
    set_precision(attach_config(base, config, adapter_name, start, batches), full=True)
    activate(base, routing)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors under the base's own names, with adapters on it."""
    return {key: one for key, one in _base(model).state_dict().items() if not is_ours(key)}


class _StateError(LorakitError, RuntimeError):
    """Tensors that do not fit a model, which torch reports by RuntimeError."""


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Put tensors under the base's own names into the base, below the adapters."""
    found = _base(model).load_state_dict(dict(state_dict), strict=False)
    missing = [key for key in found.missing_keys if not is_ours(key)]
    if strict and (missing or found.unexpected_keys):
        raise _StateError(
            f"set_base_model_state_dict: the base lacks {found.unexpected_keys}, and the tensors lack {missing}."
        )
    return torch.nn.modules.module._IncompatibleKeys(missing, found.unexpected_keys)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a quantised model, put its float parameters into float32, and turn gradient checkpointing on."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing:
        options = dict(gradient_checkpointing_kwargs or {"use_reentrant": True})
        if options.get("use_reentrant", True):
            cast(Any, model).enable_input_require_grads()
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Trainable parameters in float32, all others in `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """LoRA+: every B learns `loraplus_lr_ratio` times as fast as its A."""
    options.pop("loraplus_lr_embedding", None)
    roles = {
        id(parameter): role
        for adapter in adapters(_base(model)).values()
        for (name, parameter), role in zip(adapter.named_parameters(), adapter.roles().values(), strict=True)
        if name
    }
    named = list(model.named_parameters())
    groups = parameter_groups(
        named, {name: roles.get(id(one), "") for name, one in named}, lr, loraplus_weight_decay, loraplus_lr_ratio
    )
    return optimizer_cls([{key: one for key, one in own.items() if key != "names"} for own in groups], **options)


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | Path, adapter_name: str = "default", torch_device: Any = None, **_: Any
) -> None:
    """Put another LoRA's numbers into a live one, in place: nothing is compiled again."""
    swap(_adapter(model, adapter_name), model_name_or_path)


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Which adapters are on a model, and how they are."""
    return model_status(_base(model), model if isinstance(model, PeftModel) else None)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The adapters of each adapted layer."""
    return layer_status(_base(model), isinstance(model, PeftModel))


# -- other methods as LoRA, and scales ----------------------------------------------------------------------------------------


@contextmanager
def _resized(model: nn.Module, rank: float, name: str) -> Iterator[Adapter]:
    """Within the block, the adapter as a plain LoRA beside it: of this rank, or with this share of the squares."""
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise LorakitError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank == 0:
        raise LorakitError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    adapter, base = _adapter(model, name), _base(model)
    if adapter.edits or adapter.saved == tuple(adapter.layers):
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    config = getattr(model, "peft_config", {}).get(name)
    if config is not None and config.peft_type == "LORA":
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=4,
        )
    wanted: dict[str, Any] = {"energy": rank} if isinstance(rank, float) else {"rank": rank}
    made = resize(adapter, name=f"{name}-as-lora", **wanted).adapter
    assert made is not None
    try:
        yield made
    finally:
        detach(base, made.name)


def convert_to_lora(
    model: nn.Module, rank: float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The nearest LoRA of an adapter of any method that adds to weights: its configuration and tensors. A `rank` of type
    float is a share of the squared singular values of each layer."""
    with _resized(model, rank, adapter_name) as made:
        config: PeftConfig = PeftConfig.from_peft_type(**config_of(made))
        return config, get_peft_model_state_dict(model, adapter_name=made.name)


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """`convert_to_lora`, as a folder."""
    with _resized(model, rank, adapter_name) as made:
        made.save(path)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block the adapters that act do so by `multiplier`."""
    if not isinstance(multiplier, int | float) or isinstance(multiplier, bool):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    base = _base(model)
    if not adapters(base):
        raise LorakitError("scaling is only supported for models with `LoraLayer`s")
    routing = state_of(base).routing
    if routing.weights is None:
        raise LorakitError(
            "rescale_adapter_scale: rows have adapters of their own; give each its weight in lorakit.use."
        )
    with use(base, {name: weight * multiplier for name, weight in zip(routing.names, routing.weights, strict=True)}):
        yield


class AutoPeftModel:
    """The base model that an adapter folder names, with the adapter on it."""

    task: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> PeftModel:
        """Load both. `options` go to the base model's `from_pretrained`."""
        import transformers

        config = config or PeftConfig.from_pretrained(model_id)
        if config.base_model_name_or_path is None:
            raise LorakitError(
                f"AutoPeftModel: {model_id} does not say which base it is for; load that, then PeftModel.from_pretrained."
            )
        auto = _AUTO.get(str(cls.task or config.task_type))
        mapping = config.auto_mapping or {}
        name = auto or mapping.get("base_model_class")
        if name is None or not hasattr(transformers, name):
            raise LorakitError(f"AutoPeftModel: {model_id} has neither a task_type nor the class of its base model.")
        options.setdefault("revision", config.revision)
        base = getattr(transformers, name).from_pretrained(config.base_model_name_or_path, **options)
        wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(cls.task or config.task_type), PeftModel)
        return wrapper.from_pretrained(base, model_id, adapter_name, is_trainable, revision=revision)


_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
AUTO: dict[str, type[AutoPeftModel]] = {
    name.replace("AutoModel", "AutoPeftModel")
    if task != "FEATURE_EXTRACTION"
    else "AutoPeftModelForFeatureExtraction": type(
        name.replace("AutoModel", "AutoPeftModel")
        if task != "FEATURE_EXTRACTION"
        else "AutoPeftModelForFeatureExtraction",
        (AutoPeftModel,),
        {"task": task, "__doc__": f"The same for {task}.", "__module__": __name__},
    )
    for task, name in _AUTO.items()
}
"""Name of the class -> the class for its task."""


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Nothing to do: the wrapper's forward has the model's signature."""
    inspect.signature(model.forward)


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except LorakitError:
        return False
    return True
