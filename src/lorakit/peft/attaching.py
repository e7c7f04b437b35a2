"""An adapter as PEFT's configuration describes it; whatever cannot be honoured is refused by its name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.attachment import attach
from lorakit.adapter.targets import Targets, input_embedding, select
from lorakit.core.delta import LowRank, Method
from lorakit.core.options import options_of
from lorakit.core.walking import has_suffix, walk
from lorakit.edits.contract import EditMethod
from lorakit.errors import LorakitError
from lorakit.experts.attachment import route
from lorakit.experts.xlora import XLoRA
from lorakit.files.formats import FORMATS, format_of, known_entries, spec_from_peft
from lorakit.files.interchange import COMMON, asked_targets, heads_for
from lorakit.files.store import load
from lorakit.files.table import TABLE
from lorakit.init import EVA, CorDA, Initialiser, LoftQ, LoRAGA, Orthogonal, PiSSA
from lorakit.init.calibration import Batch, Gradients
from lorakit.methods.options import lenient
from lorakit.methods.tokens import TokenRows
from lorakit.models.replication import replicate_layers
from lorakit.peft.configs import PeftConfig, default_of
from lorakit.peft.layers import as_tuner_layers
from lorakit.peft.targets import default_targets, feedforward_targets, todays_names

_seen: WeakKeyDictionary[nn.Module, list[Batch] | Gradients] = WeakKeyDictionary()
"""Base model -> what `preprocess_corda` or `preprocess_loraga` measured, until the adapter that it is for is made."""

_NARROW = (torch.float16, torch.bfloat16)
_STARTS = frozenset({"init_lora_weights", "init_weights", "init_ia3_weights"})
_OF_STARTS = frozenset({"eva_config", "corda_config", "lora_ga_config", "loftq_config"})
_OF_THE_MODEL = frozenset({"num_layers", "num_attention_heads", "num_transformer_submodules", "token_dim"})


def attach_config(
    model: nn.Module, config: PeftConfig, name: str, start: str | Initialiser | None = None, batches: Any = None
) -> Adapter:
    """The adapter that a configuration asks for, on the model."""
    if not isinstance(config, PeftConfig):
        raise LorakitError(
            f"get_peft_model: the configuration is a {type(config).__module__}.{type(config).__name__}; one of lorakit.peft, "
            "such as LoraConfig, is needed."
        )
    options = config.to_dict()
    options["peft_type"] = str(config.peft_type)
    if options["peft_type"] == "XLORA":
        return _mixture(model, options, name)
    spec = _spec(config, options)
    saved = list(options.get("modules_to_save") or [])
    paths = [path for path, _ in walk(model)]
    for head in heads_for(config.task_type):
        if head not in saved and any(has_suffix(path, head) for path in paths):
            saved.append(head)
    if spans := options.get("layer_replication"):
        replicate_layers(model, spans)
    if isinstance(spec, EditMethod):
        adapter = attach(model, spec, name=name, modules_to_save=saved)
        if options.get("init_weights") == "zero":
            for edit in adapter.edits.values():
                for parameter in edit.parameters():
                    nn.init.zeros_(parameter)
    else:
        if start is None:
            start = _start(options, spec, default_of(config, "init_weights") if "init_weights" in options else True)
            batches = _seen.pop(model, None) if isinstance(start, CorDA | LoRAGA) else None
        with lenient():
            adapter = attach(
                model,
                _complete(cast(Method, spec), model, options),
                name=name,
                target_modules=_targets(model, options),
                exclude_modules=options.get("exclude_modules"),
                layers=None if options.get("layers_to_transform") == [] else options.get("layers_to_transform"),
                layers_pattern=options.get("layers_pattern") or None,
                patterns=_patterns(cast(Method, spec), options),
                trainable_tokens=options.get("trainable_token_indices"),
                ensure_weight_tying=bool(options.get("ensure_weight_tying")),
                modules_to_save=saved,
                bias="lora_only" if str(options.get("bias", "none")).endswith("_only") else options.get("bias", "none"),
                init=start,
                batches=batches,
            )
        if any(options.get(name) is False and default_of(config, name) is not False for name in _STARTS):
            _away_from_base(adapter)
    as_tuner_layers(model)
    if config.inference_mode:
        adapter.requires_grad_(False)
    return adapter


def _mixture(model: nn.Module, options: dict[str, Any], name: str) -> Adapter:
    """X-LoRA over the adapters in the folders that its configuration names: its classifier trains, and they do not."""
    members = options["adapters"]
    if not isinstance(members, dict) or not members:
        raise LorakitError(f"XLoraConfig: adapters={members!r}; it is a dictionary of names and adapter folders.")
    for option, value in (("use_trainable_adapters", False), ("scaling_pass_value", 0.0)):
        if options[option] != value:
            raise LorakitError(f"XLoraConfig: {option}={options[option]!r} is not offered.")
    if options["enable_softmax"] == options["enable_softmax_topk"] or options["enable_softmax_topk"] != (
        options["top_k_lora"] is not None
    ):
        raise LorakitError(
            "XLoraConfig: enable_softmax weighs all adapters, enable_softmax_topk with top_k_lora the best of them; lorakit "
            "offers one or the other."
        )
    names = [str(load(model, folder, name=f"{name}_{key}", active=False).name) for key, folder in members.items()]
    spec = XLoRA(
        layerwise=options["layerwise_scalings"],
        top_k=options["top_k_lora"],
        temperature=options["softmax_temperature"],
        scale=options["global_scaling_weight"],
        depth=options["xlora_depth"],
        width=options["xlora_size"],
        classifier_dropout=options["xlora_dropout_p"],
    )
    return route(model, spec, names, name=name)


def _spec(config: PeftConfig, options: dict[str, Any]) -> Any:
    """The method with the options of the configuration; those that would be dropped are refused."""
    for name, row in FORMATS.items():
        if options["peft_type"] in row.also:
            raise LorakitError(
                f"{type(config).__name__}: lorakit does not train PEFT type {options['peft_type']}; its files are read as "
                f"{name}, which it is once it is trained. lorakit.{TABLE[name].__name__} trains that."
            )
    spec = spec_from_peft({**options, "init_lora_weights": True, "peft_version": "0.21.2"})
    known = COMMON | known_entries(spec) | _STARTS | _OF_STARTS
    dropped = format_of(spec.name).ignored - _OF_STARTS - _STARTS - _OF_THE_MODEL - {"num_virtual_tokens"}
    for name, value in options.items():
        if (name not in known or name in dropped) and value not in (default_of(config, name), None, False, {}, []):
            raise LorakitError(f"{type(config).__name__}: {name}={value!r} is not offered.")
    if options["peft_type"] == "ADALORA" and options.get("use_dora"):
        raise LorakitError("AdaLoraConfig: ADALORA does not support DoRA.")
    if options.get("layers_pattern") and options.get("layers_to_transform") in (None, []):
        raise LorakitError(
            f"{type(config).__name__}: When `layers_pattern` is specified, `layers_to_transform` must also be specified."
        )
    if (options.get("runtime_config") or {}).get("ephemeral_gpu_offload"):
        raise LorakitError("LoraConfig: runtime_config.ephemeral_gpu_offload is not offered.")
    if options["peft_type"] == "PREFIX_TUNING":
        if options["init_weights"] not in (None, "zero") or (options["init_weights"] and options["prefix_projection"]):
            raise LorakitError(f"PrefixTuningConfig: init_weights={options['init_weights']!r} is not offered.")
        return spec.replace(width=options["encoder_hidden_size"] if options["prefix_projection"] else None)
    if options["peft_type"] == "PROMPT_TUNING":
        how = str(getattr(options["prompt_tuning_init"], "value", options["prompt_tuning_init"]))
        start = {"TEXT": "text", "SAMPLE_VOCAB": "vocabulary", "RANDOM": "random"}[how]
        text = options["prompt_tuning_init_text"] if start == "text" else None
        return spec.replace(start=start, text=text, tokenizer=options["tokenizer_name_or_path"] if text else None)
    return spec


def _complete(spec: Method, model: nn.Module, options: dict[str, Any]) -> Method:
    """IA3's default layers that scale their input."""
    if options["peft_type"] == "IA3" and options["target_modules"] is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        return spec.replace(feedforward_modules=tuple(feedforward_targets(kind)))
    return spec


def _patterns(spec: Method, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Option -> {pattern: value} of those that may differ per layer."""
    given = {option: options.get(entry) for option, entry in spec.pattern_fields.items()}
    return {option: values for option, values in given.items() if values}


def _targets(model: nn.Module, options: dict[str, Any]) -> Any:
    targets, parameters = options.get("target_modules"), options.get("target_parameters") or ()
    if options["peft_type"] == "TRAINABLE_TOKENS":
        targets = targets or [input_embedding(model)]
    elif targets is None and not parameters:
        targets = default_targets(options["peft_type"], getattr(getattr(model, "config", None), "model_type", None))
    if targets is not None and not isinstance(targets, str):
        targets = todays_names(model, targets)
    return asked_targets(targets if isinstance(targets, str) else tuple(targets or ()), parameters)


def layers_asked(model: nn.Module, config: PeftConfig) -> list[str]:
    """The layers that a configuration names in a model."""
    options = {**config.to_dict(), "peft_type": str(config.peft_type)}
    layers, pattern, excluded = (
        options.get(name) or None for name in ("layers_to_transform", "layers_pattern", "exclude_modules")
    )
    targets = Targets(
        target_modules=_targets(model, options),
        exclude_modules=excluded if excluded is None or isinstance(excluded, str) else tuple(excluded),
        layers=(layers,) if isinstance(layers, int) else None if layers is None else tuple(layers),
        layers_pattern=(pattern,) if isinstance(pattern, str) else None if pattern is None else tuple(pattern),
    )
    return select(model, targets)


def _start(options: dict[str, Any], spec: Any, default: Any) -> str | Initialiser:
    """The initialiser that PEFT's `init_lora_weights` names, with its options."""
    value = options.get("init_lora_weights", options.get("init_weights", True))
    if "init_lora_weights" not in options:
        of_the_spec = any(one.option.peft == "init_weights" for one in options_of(type(spec)).values())
        if value not in (True, False, None, default) and not of_the_spec:
            raise LorakitError(
                f"{options['peft_type']}: init_weights={value!r} is not offered; {default!r} and False are."
            )
        return "default"
    name, _, rounds = str(value).lower().partition("_niter_")
    used = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config", "loftq": "loftq_config"}
    for entry in _OF_STARTS:
        if options[entry] and used.get(name) != entry:
            raise LorakitError(f"LoraConfig: {entry} was given, and init_lora_weights={value!r} does not read it.")
    if value in (True, False):
        return "default"
    own = options[used[name]] or {} if name in used else {}
    starts: dict[str, Callable[[], str | Initialiser]] = {
        "gaussian": lambda: "gaussian",
        "orthogonal": Orthogonal,
        "olora": lambda: "olora",
        "pissa": lambda: PiSSA(iterations=int(rounds) if rounds else None),
        "eva": lambda: "default",  # until initialize_lora_eva_weights
        "corda": lambda: CorDA(mode="knowledge" if own.get("corda_method") == "kpm" else "instruction"),
        "lora_ga": lambda: LoRAGA(
            direction=own.get("direction", "ArB2r"),
            size={"gd_scale": "gd", "weight_svd": "weight"}.get(own.get("scale", "stable"), own.get("scale", "stable")),
            gamma=own.get("stable_gamma", 16),
        ),
        "loftq": lambda: _loftq(own),
    }
    if name not in starts:
        raise LorakitError(
            f"LoraConfig: init_lora_weights={value!r} is not offered; True, False, {', '.join(map(repr, starts))} and "
            '"pissa_niter_4" are.'
        )
    return starts[name]()


def _loftq(own: dict[str, Any]) -> LoftQ:
    if own.get("loftq_bits", 4) != 4:
        raise LorakitError(
            f"LoraConfig: loftq_config has loftq_bits={own['loftq_bits']}; 4 (NF4) is offered under PEFT's names, "
            "lk.attach(init=lk.init.LoftQ(quantiser=…)) has more."
        )
    return LoftQ(rounds=own.get("loftq_iter", 1))


def _away_from_base(adapter: Adapter) -> None:
    """PEFT's `init_lora_weights=False` and its kin, so that the adapter acts: the factor that starts at zero is drawn as the
    other is; of other methods what starts at zero is drawn, and else everything moved by a tenth of a normal number."""
    with torch.no_grad():
        others: list[nn.Parameter] = list(adapter.pool.parameters())
        for _, _, delta in adapter.deltas():
            B = getattr(delta, "B", None)
            if isinstance(delta, TokenRows):
                if not adapter.beside(delta):
                    nn.init.normal_(delta.rows())
            elif isinstance(delta, LowRank) and B is not None:
                B.uniform_(-1 / math.sqrt(B.shape[-1]), 1 / math.sqrt(B.shape[-1]))
            else:
                others += [one for one in delta.parameters() if one.is_floating_point()]
        zero = [one for one in others if not one.any()]
        for parameter in zero:
            parameter.uniform_(-1 / math.sqrt(parameter.shape[-1]), 1 / math.sqrt(parameter.shape[-1]))
        for parameter in () if zero else others:
            parameter.add_(0.1 * torch.randn_like(parameter))


def set_precision(adapter: Adapter, full: bool) -> None:
    """The trained tensors in float32 where the base's are narrower floats; or, as PEFT has it too, as narrow as the base's."""
    for layer in adapter.layers.values():
        base = next((one.dtype for one in layer.base.parameters() if one.is_floating_point()), torch.float32)
        held = [held[adapter.name] for held in (layer.deltas, layer.replacements) if adapter.name in held]
        for tensor in [one for module in held for one in (*module.parameters(), *module.buffers())]:
            if full and tensor.dtype in _NARROW and isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.float()
            elif not full and base in _NARROW and tensor.is_floating_point():
                tensor.data = tensor.data.to(base)


# -- starts that measure ----------------------------------------------------------------------------------------------------


def _watch(model: nn.Module, run: Callable[[], Any]) -> None:
    batches: list[Batch] = []
    signature = inspect.signature(model.forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append({**signature.bind_partial(*args).arguments, **kwargs})

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    model.zero_grad()
    if not batches:
        raise LorakitError(
            "the function that was given never called the model, so that there is nothing to measure on."
        )
    _seen[model] = batches


def preprocess_corda(
    model: nn.Module,
    lora_config: PeftConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Note what `run_model` feeds the model; the next adapter with init_lora_weights="corda" starts from it."""
    if run_model is None:
        raise LorakitError("preprocess_corda: run_model is needed; files of covariances are not read.")
    _watch(hooked_model or model, run_model)
    if hooked_model is not None and hooked_model is not model:
        _seen[model] = _seen.pop(hooked_model)


def preprocess_loraga(
    model: nn.Module, lora_config: PeftConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Measure the gradients of `train_step`, whatever loss it has; the next adapter with init_lora_weights="lora_ga" starts
    from them. The weights and their own gradients stay as they are."""
    if cache_file is not None:
        raise LorakitError(
            "preprocess_loraga: cache_file is not offered; files of gradients are neither read nor written."
        )
    before = [(one, one.requires_grad, one.grad) for one in model.parameters() if one.is_floating_point()]
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = model.register_forward_hook(count)
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(parameter.ndim > 1)
        train_step()
        found = {id(one): one.grad / max(1, calls[0]) for one, _, _ in before if one.grad is not None}
    finally:
        handle.remove()
        for parameter, asked, own in before:
            parameter.requires_grad_(asked)
            parameter.grad = own
    if not found:
        raise LorakitError("preprocess_loraga: train_step computed no gradients; it must call loss.backward().")
    _seen[model] = Gradients(found)


def eva_start(config: PeftConfig, batches: Iterable[Batch]) -> tuple[EVA, list[Batch]]:
    """EVA with the options of a configuration, and its data."""
    own = config.to_dict().get("eva_config") or {}
    if own.get("label_mask_value", -100) != -100 or not own.get("adjust_scaling_factors", True):
        raise LorakitError(
            "EvaConfig: label_mask_value other than -100 and adjust_scaling_factors=False are not offered."
        )
    return (
        EVA(
            rho=own.get("rho", 2.0),
            cosine=own.get("tau", 0.99),
            whiten=own.get("whiten", False),
            labelled=own.get("use_label_mask", True),
        ),
        list(batches),
    )
