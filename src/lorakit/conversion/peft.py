"""PEFT's folder, which is lorakit's own: the only format that keeps a rank and an alpha per layer by patterns.

Its configuration holds for all layers, so a folder has one method; layers of other methods are folded into it where that is
exact, or refused. What PEFT has no word for (full matrices, DoRA over others than LoRA) goes into lorakit.json.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorakit.adapter.targets import Targets
from lorakit.conversion.content import Content, write_bundles
from lorakit.conversion.description import (
    EVERY,
    MAGNITUDE,
    Description,
    Layer,
    assemble,
    fitted,
    method_name,
    with_one_factor,
)
from lorakit.conversion.experts import EXPERT, apart, as_stack, expert_layout, fused
from lorakit.conversion.format import CONVOLUTION, EMBEDDING, LINEAR, Format, Target, grouped
from lorakit.conversion.names import Names, component_of, guess_component
from lorakit.core.delta import Method
from lorakit.core.layout import Convolution
from lorakit.core.walking import as_patterns, value_for
from lorakit.errors import LorakitError
from lorakit.files.bundle import own_data
from lorakit.files.formats import OTHER_AXES, format_of, spec_from_peft
from lorakit.files.interchange import PREFIX, bare, method_entries
from lorakit.files.stacked import MARKER, unstack
from lorakit.files.table import spec_from_dict
from lorakit.methods import DoRA, Full, LoHa, LoKr, LoRA

_KEY = re.compile(
    r"(?P<layer>.+)\.(?P<word>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|full_P)(?P<weight>\.weight)?"
)
_COPY = re.compile(r".+\.base_layer\.weight")
"""PEFT writes an adapted embedding's own frozen weight beside the adapter."""


def claims(content: Content) -> bool:
    return "peft_type" in content.config


def read(contents: Mapping[str, Content], names: Names) -> Description:
    """Folders of PEFT or lorakit, one per component."""
    components: dict[str, dict[str, Layer]] = {}
    notes: list[str] = []
    base = None
    for name, content in contents.items():
        layers, copies = _layers(content)
        auto = (content.config.get("auto_mapping") or {}).get("base_model_class", "")
        component = name or component_of(auto) or guess_component(layers)
        components[component] = layers
        base = base or content.config.get("base_model_name_or_path")
        notes += [f"{key} is a copy of the base's own weight and was left out" for key in copies]
    return Description(components, base, tuple(notes))


def _layers(content: Content) -> tuple[dict[str, Layer], list[str]]:
    found = unstack(content.tensors, content.config, f"convert: {content.where}", trusted=bool(content.own))
    content = replace(content, tensors=found.tensors, config=found.config)
    experts = {
        stack.expert(index): (index, stack.count) for stack in found.stacks.values() for index in range(stack.count)
    }
    config = content.config
    method = _method(content)
    copies = [key for key in content.tensors if _COPY.fullmatch(key)]
    kept = replace(content, tensors={key: value for key, value in content.tensors.items() if key not in copies})
    # patterns by the rule of LoRA: the first that a layer's name ends with
    patterns = {**config, **format_of(method.name).patterns(config)}
    layers: dict[str, Layer] = {}
    for name, words in grouped(kept, lambda key: _cut(key, content.where)).items():
        where = f"{content.where}: {name}"
        changes: dict[str, Any] = {}
        for option, pattern in method.pattern_fields.items():
            value = value_for(patterns.get(pattern) or {}, name)
            if value is not None:
                changes[option] = value
        layers[name] = assemble(method.replace(**changes) if changes else method, words, where)
        if name in experts:
            layers[name] = expert_layout(layers[name], *experts[name])
    return layers, copies


def _method(content: Content) -> Method:
    """The common spec, as a plain LoRA where lorakit has another word for one."""
    own = content.own.get("method", {})
    spec: Any = spec_from_dict(own, content.where) if own else None
    theirs = content.config.get("peft_type") == format_of(spec.name).peft if spec is not None else True
    if spec is None or (theirs and not _lone_dora(spec)):
        spec = spec_from_peft(content.config)
    inner = spec.inner if isinstance(spec, DoRA) else spec
    if not isinstance(inner, LoRA | LoHa | LoKr | Full):
        raise LorakitError(
            f"convert: {content.where} is {spec.name}, which only PEFT's format and lorakit's own have. `lorakit resize "
            "--energy 1.0` (with the base model) makes a LoRA of a method that changes weights, and that converts."
        )
    if isinstance(inner, LoRA):
        inner = replace(
            inner, dropout=0.0
        )  # said by PEFT's file, and no part of what an adapter does once it is trained
    return spec.replace(inner=inner) if isinstance(spec, DoRA) else inner


def _lone_dora(spec: Any) -> bool:
    return isinstance(spec, DoRA) and not isinstance(spec.inner, LoRA)


def _cut(key: str, where: str) -> tuple[str, str]:
    found = _KEY.fullmatch(bare(key))
    if found is None or (found["weight"] and found["word"] != MAGNITUDE):
        raise LorakitError(
            f"convert: {where} holds {key!r}: neither a factor nor a magnitude. Modules trained whole (modules_to_save) and "
            "biases have a place in PEFT's format only."
        )
    return found["layer"], found["word"]


# -- writing ---------------------------------------------------------------------------------------------------------------


def write(description: Description, target: Target) -> tuple[dict[str, Content], Description]:
    """One folder per component, each with one method."""
    contents: dict[str, Content] = {}
    notes: list[str] = []
    alone = len(description.components) == 1
    for component, layers in description.components.items():
        plain, experts = apart(layers)
        one, said = _one_method(plain)
        notes += said
        stacks = {module: fused(module, matrices, target.names.stacks) for module, matrices in experts.items()}
        contents["" if alone else component] = _folder(component, one, stacks, target.base or description.base)
    return contents, description.noting(*notes)


def _one_method(layers: dict[str, Layer]) -> tuple[dict[str, Layer], list[str]]:
    kinds = Counter(method_name(layer.method) for layer in layers.values())
    if not kinds:
        return layers, []
    if len(kinds) == 1 and not all(isinstance(layer.inner, LoKr) for layer in layers.values()):
        return layers, []
    if len(kinds) == 1 and (uniform := with_one_factor(layers)) is not None:
        return uniform, []
    try:
        folded = fitted(Description({"": layers}), ("lora",), "one folder of PEFT's format")
    except LorakitError as problem:
        listed = ", ".join(f"{count} × {name}" for name, count in kinds.items())
        raise LorakitError(
            f"convert: PEFT's folder has one method, and this adapter has {listed}. {problem}"
        ) from problem
    return folded.components[""], list(folded.notes)


def _folder(
    component: str,
    layers: dict[str, Layer],
    stacks: Mapping[str, Mapping[str, tuple[LoRA, Tensor, Tensor]]],
    base: str | None,
) -> Content:
    methods: dict[str, Method] = {path: layer.method for path, layer in layers.items()}
    methods |= {f"{module}.{name}": spec for module, own in stacks.items() for name, (spec, *_) in own.items()}
    if stacks and not all(isinstance(method, LoRA) for method in methods.values()):
        raise LorakitError("convert: PEFT's folder has one method, LoRA for experts, and this adapter has others too.")
    first = next(iter(methods.values()))
    common: dict[str, Any] = {}
    patterns: dict[str, dict[str, Any]] = {}
    for name, option in first.pattern_fields.items():
        values = {path: getattr(method, name) for path, method in methods.items()}
        common[name], patterns[option] = as_patterns(values)
    method = first.replace(**common) if common else first
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        for word, tensor in layer.words().items():
            tensors[f"{PREFIX}{path}.{word}"] = tensor
    for module, parameters in stacks.items():
        for depth, (_, A, B) in enumerate(reversed(list(parameters.values()))):
            stem = f"{PREFIX}{module}{'.base_layer' * depth}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = as_stack(A, B)
    named = [f"{module}.{name}" for module, own in stacks.items() for name in own]
    config = {
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "modules_to_save": None,
        **method_entries(method, sorted(layers), "none"),
        **patterns,
        **({"target_parameters": named, "peft_version": "0.21.2", **MARKER} if stacks else {}),
    }
    own: dict[str, Any] = {}
    windows = [layer.layout.window for layer in layers.values() if isinstance(layer.layout, Convolution)]
    turned = any(key.endswith(".lokr_w2") for key in tensors) and any(len(window) == 2 for window in windows)
    if turned:
        config["peft_type"] = OTHER_AXES
    if format_of(method.name).peft is None or _lone_dora(method) or turned:
        targets = Targets(
            target_modules=tuple(sorted(layers)),
            patterns={name: patterns[option] for name, option in first.pattern_fields.items()},
        )
        own = own_data(method.to_dict(), targets.as_data(), {"name": base, "fingerprint": None})
    return Content(component, tensors, {}, config, own)


PEFT = Format(
    name="peft",
    title="PEFT, vLLM, lorakit",
    file="folder: adapter_config.json, adapter_model.safetensors",
    suffix="",
    holds=EVERY,
    kinds=(LINEAR, CONVOLUTION, EMBEDDING, EXPERT),
    about="any",
    scale="configuration: alpha and rank, patterns per layer, rsLoRA",
    limits="One method per folder; a pipeline is one folder per component. Full matrices and DoRA over LoHa or LoKr "
    "are read by "
    "lorakit alone.",
    claims=claims,
    read=read,
    write=write,
    save=write_bundles,
)
