"""An adapter in PEFT's words: the names and shapes of its tensors, and PEFT's configuration, both ways.

What is written names exactly the layers that the adapter has, whatever was asked for when it was made, so that PEFT's
matching selects the same ones. Wrappers around a model or its blocks (torch.compile, DistributedDataParallel, FSDP) are
no part of a layer's name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.targets import PRESETS, Targets, input_embedding
from lorakit.core.delta import Delta, LowRank, Method
from lorakit.core.layer import Adapted
from lorakit.core.layout import Rows, Site
from lorakit.core.offset import Offset
from lorakit.core.stacks import is_router
from lorakit.core.walking import as_patterns, exactly, has_suffix, value_for, walk
from lorakit.errors import LorakitError
from lorakit.files.experts import in_stacks, stack_spec, stack_tensors, stacks_of
from lorakit.files.formats import entries_of, format_of
from lorakit.files.packing import edit_tensors, is_pair, pack, spec_in_file, views
from lorakit.methods.tokens import TokenRows
from lorakit.models.replication import replication_of

PREFIX = "base_model.model."
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
_PRIVATE = frozenset(attribute for attribute in _WRAPPERS.values() if attribute.startswith("_"))
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""modules_to_save that PEFT adds by itself for a task, whether the model has them or not."""
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""End of a class of transformers -> PEFT's task type."""
_REWRITTEN = frozenset({"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"})
"""Names of layers that PEFT takes for those of the experts of transformers 4, in shared experts too, and forgets: in a
mixture of experts they are named as parameters, which it leaves alone and computes in the same way."""
COMMON = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
     "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
     "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices", "ensure_weight_tying",
     "layer_replication"}
)  # fmt: skip
"""Entries of PEFT's configuration that are read for every method."""


def plain_names(model: nn.Module) -> dict[str, str]:
    """Module path -> its path in the model without wrappers, for every module of the base model."""
    plain: dict[str, str] = {}
    wraps: dict[str, str | None] = {}
    for path, module in walk(model):
        parent, _, step = path.rpartition(".")
        if not path:
            plain[path] = ""
        elif wraps[parent] == step:
            plain[path] = plain[parent]
        else:
            plain[path] = f"{plain[parent]}.{step}" if plain[parent] else step
        wraps[path] = _WRAPPERS.get(type(module).__name__)
    return plain


# -- tensors ---------------------------------------------------------------------------------------------------------------


def site_prefix(adapter: Adapter, site: Site, delta: Delta) -> str:
    """Where PEFT puts the tensors of a site's delta below its layer."""
    if adapter.beside(delta):
        return "token_adapter."
    if site.name in ("", "in_proj"):
        return ""
    return f"base_layer.{site.name}." if site.layout.kind == "attention" else f"{site.name}."


def replacement_key(adapter: Adapter, path: str, plain: str, name: str) -> str:
    """PEFT's name, without the prefix, of a replaced tensor: biases of adapted layers are below `base_layer`."""
    layer = adapter.layers[path]
    if path in adapter.saved or not layer.deltas_of(adapter.name):
        return f"{plain}.{name}"
    inside = {site.weight.rpartition(".")[0] for site in layer.sites.values()}
    owner, _, last = name.rpartition(".")
    if owner and owner in inside:  # nn.MultiheadAttention's out_proj is an adapted layer within an adapted layer
        return f"{plain}.base_layer.{owner}.base_layer.{last}"
    return f"{plain}.base_layer.{name}"


def parts_of(layer: Adapted, adapter: str) -> list[tuple[Site, LowRank]]:
    """The row parts of a fused layer that this adapter changes, in order; empty for other layers."""
    deltas = layer.deltas_of(adapter)
    sites = [(layer.sites[key], delta) for key, delta in deltas.items()]
    if not sites or not isinstance(sites[0][0].layout, Rows):
        return []
    for _, delta in sites:
        if not is_pair(delta):
            raise LorakitError(
                f"save: {layer.path} is split into parts, which PEFT's format has for LoRA without a bias alone; its method "
                f"is {delta.spec.name}."
            )
    return [(site, cast(LowRank, delta)) for site, delta in sites]


def blocks(parts: list[tuple[Site, LowRank]]) -> list[tuple[Tensor, Tensor, Tensor, slice, float]]:
    """`(B, A, rows, columns, factor)` of every pair of a fused layer's parts: where its B stands in the file's, which has one
    scale (the first part's) for the whole layer, so that B is kept times a factor. A's are one upon the other."""
    found, start, first = [], 0, parts[0][1].scale
    for site, delta in parts:
        factor = 1.0 if delta.scale == first else delta.scale / first
        for B, A in delta.pairs():
            columns = slice(start, start + A.shape[0])
            found.append((B.detach(), A.detach(), cast(Rows, site.layout).index(A.device), columns, factor))
            start = columns.stop
    return found


def _fused(parts: list[tuple[Site, LowRank]]) -> tuple[Tensor, Tensor]:
    """The parts of a fused layer as one pair of factors: A stacked, B block by block. Exact, at the sum of the ranks."""
    own = blocks(parts)
    A = torch.cat([piece for _, piece, *_ in own])
    B = A.new_zeros(cast(Rows, parts[0][0].layout).inner.shape.out, len(A))
    for piece, _, rows, columns, factor in own:
        B[rows, columns] = piece * factor
    return B, A


def gathered(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 spreads over processes (a DTensor) as a whole; every process must come here."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors of an adapter under PEFT's names, each with memory of its own (as safetensors wants it)."""
    result: dict[str, Tensor] = {}
    plain = plain_names(adapter.model)
    for path, layer in adapter.layers.items():
        parts = parts_of(layer, adapter.name)
        if parts:
            B, A = _fused(parts)
            result[f"{plain[path]}.lora_A.weight"], result[f"{plain[path]}.lora_B.weight"] = A, B
            continue
        if in_stacks(layer, adapter.name):
            result |= stack_tensors(layer, adapter.name, plain[path])
            continue
        for key, delta in layer.deltas_of(adapter.name).items():
            site = layer.sites[key]
            if adapter.beside(delta) and delta.leader:
                continue
            for name, view in views(delta, site.layout.kind).items():
                result[f"{plain[path]}.{site_prefix(adapter, site, delta)}{name}"] = pack(
                    site.layout, view.whole(), view.axes
                )
    for path, replacement in adapter.replacements():
        for name, tensor in replacement.tensors().items():
            key = replacement_key(adapter, path, plain[path], name)
            if path in adapter.saved:
                key = f"{plain[path]}.{format_of(adapter.method.name).replaced}{name}"
            result[key] = tensor.detach()
    edits = edit_tensors(adapter)
    for (path, name), tensor in edits.items():
        if path:
            result[f"{plain[path]}.{name}"] = tensor
    # PEFT has no tuner around the model of a prompt, and so no second step in the names of modules that are saved whole
    prefix = "base_model." if edits and not any(path for path, _ in edits) else PREFIX
    result = {prefix + key: gathered(tensor).contiguous() for key, tensor in result.items()}
    for name, tensor in adapter.pool.state_dict().items():
        result[f"base_model.{name}"] = gathered(tensor).contiguous()
    for (path, name), tensor in edits.items():
        if not path:
            result[name] = gathered(
                tensor
            ).contiguous()  # PEFT keeps what stands in front of the input without a prefix
    for name, tensor in adapter.router.state_dict().items() if adapter.router is not None else ():
        result[f"base_model.{format_of(adapter.method.name).router}{name}"] = gathered(tensor).contiguous()
    held: set[int] = set()
    for key, tensor in result.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in held or storage.nbytes() != tensor.numel() * tensor.element_size():
            result[key] = tensor.clone()
        held.add(storage.data_ptr())
    return result


def bare(key: str) -> str:
    """A tensor's name in a file without PEFT's prefix, however often a model was wrapped before it was saved."""
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key.removeprefix("base_model.")


def names_in(tensors: Mapping[str, Tensor], plain: Mapping[str, str], where: object) -> dict[str, Tensor]:
    """The tensors of a file under their names below the model's own modules (`plain`, see `plain_names`): PEFT's prefix and
    all wrappers taken off."""
    tops = {path.partition(".")[0] for path in plain.values()}
    own = {path.rpartition(".")[2] for path in plain.values()}
    result: dict[str, Tensor] = {}
    whole: set[str] = set()
    for key, tensor in tensors.items():
        steps = [step for step in bare(key).split(".") if step not in _PRIVATE and step != "modules_to_save"]
        if "default" not in own:  # the adapter's name, in a state dict that was saved by hand
            steps = [step for step in steps if step != "default"]
        if steps[0] == "module" and "module" not in tops:  # DistributedDataParallel's
            steps = steps[1:]
        if "original_module" in steps:  # with bias="all" PEFT writes the base's own bias beside that of modules_to_save
            steps = [step for step in steps if step != "original_module"]
            twin = f"{PREFIX}{'.'.join(steps[:-1])}.modules_to_save.{steps[-1]}"
            if twin in tensors:
                continue
        name = ".".join(steps)
        if ".modules_to_save." in key:
            whole.add(name)
        if name in whole and name in result and torch.equal(result[name], tensor):
            continue  # PEFT writes the bias of a module that it also has whole in both places
        if name in result:
            raise LorakitError(f"load: {where} holds {name!r} twice, under two prefixes.")
        result[name] = tensor
    return result


# -- the configuration, written ----------------------------------------------------------------------------------------------


def _module_names(model: nn.Module) -> list[str]:
    """Every module that PEFT's matching sees, by plain name, also those inside nn.MultiheadAttention."""
    names = []
    plain = plain_names(model)
    for path, module in walk(model):
        names.append(plain[path])
        if isinstance(module, nn.MultiheadAttention):
            names += [f"{plain[path]}.{inner}" for inner, _ in module.named_modules() if inner]
    return [name for name in names if name]


def target_modules(paths: list[str], model: nn.Module) -> list[str] | str:
    """The shortest request that selects exactly these layers by PEFT's rule.

    Suffixes where they do; else whole names; else, where a whole name is the end of another, a regular expression.
    """
    everything, wanted = _module_names(model), set(paths)
    endings = sorted({path.rpartition(".")[2] for path in paths})
    for request in (endings, sorted(paths)):
        if {name for name in everything if any(has_suffix(name, one) for one in request)} == wanted:
            return request
    return "|".join(re.escape(path) for path in sorted(paths))


def _spread(
    fields: Iterable[str], specs: Mapping[str, Method], pattern: Callable[[str], str] = exactly
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The most common value of each option that may differ per layer, and patterns for the layers that have another."""
    split = {
        field: as_patterns({path: getattr(spec, field) for path, spec in specs.items()}, pattern)
        for field in fields
        if specs
    }
    return {field: one for field, (one, _) in split.items()}, {field: rest for field, (_, rest) in split.items()}


def _specs(adapter: Adapter, plain: Mapping[str, str]) -> dict[str, Method]:
    """Plain layer name (or that of a stack of experts) -> the spec that the file gives for it."""
    specs: dict[str, Method] = {}
    for path, layer in adapter.layers.items():
        deltas = [one for one in layer.deltas_of(adapter.name).values() if not adapter.beside(one) and not one.leader]
        stacks = in_stacks(layer, adapter.name)
        for parameter, experts in stacks.items():
            specs[f"{plain[path]}.{parameter}"] = stack_spec(experts)
        if deltas and not stacks:
            parts = parts_of(layer, adapter.name)
            specs[plain[path]] = _fused_spec(parts) if parts else spec_in_file(deltas[0])
    return specs


def stored(adapter: Adapter) -> tuple[Any, Targets]:
    """The method and the request that make an adapter as it is in a file: its own, unless ranks have changed since it was
    attached (a schedule has moved, taken or added some); then each layer's own rank and scale by its exact name."""
    if adapter.edits:
        return adapter.method, adapter.targets
    method: Method
    asked: dict[str, Method] = {}
    found: dict[str, Method] = {}
    halves = shifted(adapter)
    stacks = {path: in_stacks(layer, adapter.name) for path, layer in adapter.layers.items()}
    for path, site, delta in adapter.deltas():
        if adapter.beside(delta) or delta.leader:
            continue
        where, stack = site.place(path), stacks[path].get(site.weight)
        asked[where] = adapter.targets.spec_for(adapter.method, path, site)
        found[where] = asked[where] if halves else stack_spec(stack) if stack else spec_in_file(delta)
    if found == asked:
        return adapter.method, adapter.targets
    method = adapter.method
    if any(type(spec) is not type(method) for spec in found.values()):
        method = next(iter(found.values()))
    common, patterns = _spread(method.pattern_fields, found)
    return method.replace(**common), dataclasses.replace(
        adapter.targets, patterns={**adapter.targets.patterns, **patterns}
    )


def shifted(adapter: Adapter) -> bool:
    """Whether a reader can tell in the file what is trained from the start that is taken off it: all of the adapter's
    deltas have such a start, and the ranks that they had then. If not, the file reads as one product of the whole rank."""
    starts = [module for _, _, delta in adapter.deltas() for module in delta.modules() if isinstance(module, Offset)]
    return bool(starts) and all(spec_in_file(start.inner) == start.inner.spec for start in starts)


def _exact(others: Collection[str], path: str) -> str:
    """A pattern that matches this layer and no other by PEFT's rule: its name, with an anchor where that is not enough."""
    if all(other == path or value_for({path: True}, other) is None for other in others):
        return path
    return exactly(path)


def _fused_spec(parts: list[tuple[Site, LowRank]]) -> Method:
    """The spec of a fused layer's parts taken as one low-rank pair, with the first part's scale."""
    rank = sum(delta.factors()[1].shape[0] for _, delta in parts)
    return spec_in_file(parts[0][1]).resized(rank)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's and the like."""
    while type(model).__name__ in _WRAPPERS:
        model = cast(nn.Module, getattr(model, _WRAPPERS[type(model).__name__]))
    return model


def _task(model: nn.Module) -> str | None:
    """PEFT's task type, where PEFT attaches no conditions to it: for classification it adds modules_to_save, and for
    SEQ_2_SEQ_LM it hands the model `input_ids`, which one that hears does not take."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    both = name.endswith("ForConditionalGeneration") and getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )
    return "SEQ_2_SEQ_LM" if both and "input_ids" in inspect.signature(model.forward).parameters else None


def _general(adapter: Adapter, base: str | None) -> dict[str, Any]:
    """Entries of PEFT's configuration that every kind of adapter has."""
    model = unwrapped(adapter.model)
    task = _task(model)
    if adapter.edits:  # without a task PEFT reads a prompt, and never puts it before the input
        task = task or next((word for end, word in _TASKS.items() if type(model).__name__.endswith(end)), None)
    # PEFT's AutoPeftModel needs the model's class where there is no task.
    mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "task_type": task,
        "base_model_name_or_path": base or getattr(model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None if task else mapping,
        "modules_to_save": [plain_names(adapter.model)[path] for path in adapter.saved] or None,
    }


def method_entries(method: Method, target_modules: list[str] | str, bias: str) -> dict[str, Any]:
    """Entries of PEFT's configuration that say what is done to which layers, all of them named."""
    return {
        "target_modules": target_modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": bias,
        **entries_of(method),
    }


def config_of(adapter: Adapter, base: str | None = None) -> dict[str, Any]:
    """PEFT's adapter_config.json for an adapter."""
    config, whole = _general(adapter, base), format_of(adapter.method.name).whole
    if adapter.edits:
        return {**config, **entries_of(adapter.method), **whole(adapter, {})}
    plain = plain_names(adapter.model)
    specs = _specs(adapter, plain)
    common, patterns = _spread(adapter.method.pattern_fields, specs, functools.partial(_exact, specs))
    method = adapter.method.replace(**common) if common else adapter.method
    modules = set(plain.values())
    bare = [name for name in specs if name not in modules]
    routers = {plain[path] for path, layer in adapter.layers.items() if is_router(layer.base)}
    if adapter.method.name == "lora" and _is_mixture(adapter.model):
        named = [
            name for name in specs if name in routers or (name in modules and name.rpartition(".")[2] in _REWRITTEN)
        ]
        bare += [f"{name}.weight" for name in named]
    layers = [name for name in specs if name in modules and f"{name}.weight" not in bare]
    if method.whole:  # the modules are what is targeted
        layers, config["modules_to_save"] = [plain[path] for path in adapter.saved], None
    config |= method_entries(method, target_modules(layers, adapter.model), adapter.targets.bias)
    if bare:
        # PEFT has no dropout on parameters; its version says how the factors of a square matrix lie, which sizes do not
        config |= {"target_parameters": bare, "lora_dropout": 0.0, "peft_version": "0.21.2"}
    for field, option in adapter.method.pattern_fields.items():
        config[option] = patterns.get(field, {})
    config |= whole(adapter, specs)
    rows = {
        plain[path]: list(delta.spec.tokens)
        for path, _, delta in adapter.deltas()
        if isinstance(delta, TokenRows) and adapter.beside(delta) and not delta.leader
    }
    if rows and config["peft_type"] not in ("LORA", "ADALORA"):
        config["peft_type"] += "-TOKENS"  # PEFT has rows that train alone beside these two
    if spans := replication_of(unwrapped(adapter.model)):
        config["layer_replication"] = spans
    tying = {"ensure_weight_tying": True} if adapter.targets.ensure_weight_tying else {}
    return {**config, **tying, **({"trainable_token_indices": rows} if rows else {})}


def _is_mixture(model: nn.Module) -> bool:
    """Whether a model is of a family with experts; PEFT rewrites names by the family, also where no block has any."""
    configs = [getattr(model, "config", None)]
    configs += [getattr(configs[0], "text_config", None)]
    names = [name for config in configs for name in getattr(config, "__dict__", ()) if not name.startswith("_")]
    told = any("experts" in name for name in names)  # every configuration of transformers has a private one
    return told or any(stacks_of(module) for _, module in walk(model))


# -- the configuration, read -------------------------------------------------------------------------------------------------


def targets_from(
    config: Mapping[str, Any], model: nn.Module, fields: Mapping[str, str], tensors: Iterable[str] = ()
) -> Targets:
    """What PEFT's configuration asks for.

    Heads that PEFT names for a task on its own need not exist. PEFT takes modules_to_save for mere ends of names ("norm"
    for "layernorm" too); such modules count where the file, whose names are `tensors`, has them. `fields` are the method's
    `pattern_fields`.
    """

    def names(value: Any) -> Any:
        return value if value is None or isinstance(value, str) else tuple(value)

    bias = str(config.get("bias", "none"))
    layers = config.get("layers_to_transform")
    lists = config.get("layers_pattern") or None
    optional = _HEADS.get(str(config.get("task_type")), ())
    known = [path for path, module in walk(model) if path and any(True for _ in module.parameters())]
    saved = [
        name
        for name in dict.fromkeys(config.get("modules_to_save") or ())
        if name not in optional or any(has_suffix(path, name) for path in known)
    ]
    plain = plain_names(model)
    held = {key.rpartition(".")[0] for key in tensors}
    loose = [path for path in known if plain[path] in held and path.endswith(tuple(saved)) and saved]
    saved += [path for path in loose if not any(has_suffix(path, name) for name in saved)]
    return Targets(
        target_modules=asked_targets(names(config.get("target_modules")) or (), config.get("target_parameters") or ()),
        exclude_modules=names(config.get("exclude_modules")) or None,
        layers=None if layers is None or layers == [] else (layers,) if isinstance(layers, int) else tuple(layers),
        layers_pattern=(lists,) if isinstance(lists, str) else None if lists is None else tuple(lists),
        patterns={option: config.get(name) or {} for option, name in fields.items()},
        modules_to_save=tuple(saved),
        trainable_tokens=tokens_in(config, model),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        bias="lora_only" if bias.endswith("_only") else bias,  # "oft_only" and the like: each method has its own word
    )


def tokens_in(config: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The rows that a configuration trains alone, by the name of their table."""
    given = config.get("trainable_token_indices")
    if not given:
        return {}
    named = given if isinstance(given, Mapping) else {input_embedding(model): given}
    return {name: tuple(tokens) for name, tokens in named.items()}


def asked_targets(modules: str | tuple[str, ...], parameters: Iterable[str]) -> str | tuple[str, ...]:
    """PEFT's target_modules and target_parameters as one request: parameters are named as modules are."""
    if isinstance(modules, str):
        named = "|".join(rf"(?:.*\.)?{re.escape(one.removesuffix('.weight'))}" for one in parameters)
        return f"{modules}|{named}" if named and modules not in PRESETS else modules
    return (*modules, *(one.removesuffix(".weight") for one in parameters))


def alpha_in(config: Mapping[str, Any], path: str, rank: int) -> float:
    """The alpha of a layer as PEFT's configuration says it, with the rank that its tensors have."""
    alpha = value_for(config.get("alpha_pattern") or {}, path)
    return float(config.get("lora_alpha", rank) if alpha is None else alpha)


def scale_in(config: Mapping[str, Any], path: str, rank: int) -> float:
    """The s of `ΔW = s B A` of a LoRA's layer: alpha / rank, or alpha / √rank (rsLoRA)."""
    return alpha_in(config, path, rank) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def heads_for(task: str | None) -> tuple[str, ...]:
    """modules_to_save that PEFT adds by itself for a task."""
    return _HEADS.get(str(task), ())
