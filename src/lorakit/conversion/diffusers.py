"""Diffusers' pipeline file: PEFT's words below the component's name, as `save_lora_weights` writes it.

    unet.down_blocks.0.attentions.1.proj_in.lora_A.weight       and text_encoder., text_encoder_2., transformer.

The scale is in the file's metadata (`lora_adapter_metadata`, PEFT's configuration per component); files without it have
scale 1, unless `.alpha` tensors say otherwise. Older spellings are read too: `.lora.down.weight`, `processor.to_q_lora.down.
weight`, `.lora_linear_layer.down.weight`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from lorakit.conversion.content import Content
from lorakit.conversion.description import MAGNITUDE, Description, Layer, assemble, recognise
from lorakit.conversion.format import CONVOLUTION, LINEAR, Format, Target, all_dora, ending, grouped, only
from lorakit.conversion.names import CLIP, COMPONENTS, Names, guess_component
from lorakit.core.delta import Method
from lorakit.core.walking import as_patterns, exactly, value_for
from lorakit.errors import LorakitError
from lorakit.files.formats import spec_from_peft
from lorakit.methods import DoRA, LoRA

METADATA = "lora_adapter_metadata"
WORDS = {
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    MAGNITUDE: MAGNITUDE,
    f"{MAGNITUDE}.weight": MAGNITUDE,
    "alpha": "alpha",
}
_PROCESSOR = re.compile(
    r"(?P<layer>.+?)(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora\.(?P<half>down|up)\.weight"
)
"""The oldest spelling: factors belong to the attention's processor and not to its layers."""
_CLIP_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def claims(content: Content) -> bool:
    inside = all(key.partition(".")[0] in COMPONENTS for key in content.tensors)
    return bool(content.tensors) and (inside or bool(_alone(content)))


def _alone(content: Content) -> str:
    """The component of a file of one part, whose names do not say it: `transformer_blocks.0.attn.to_q.lora_A.weight`."""
    found = [_cut(key.replace(".default.", ".")) for key in content.tensors]
    paths = [one[0] for one in found if one is not None]
    component = guess_component(paths) if len(paths) == len(found) else ""
    return component if component in ("unet", "transformer") else ""


def _under(content: Content, component: str) -> Content:
    """Such a file with the names of a whole pipeline's, in its metadata too."""
    tensors = {f"{component}.{key.replace('.default.', '.')}": tensor for key, tensor in content.tensors.items()}
    metadata = dict(content.metadata)
    if METADATA in metadata:
        own = _json(content)
        metadata[METADATA] = json.dumps({f"{component}.{key}": value for key, value in own.items()})
    return replace(content, tensors=tensors, metadata=metadata)


def read(contents: Mapping[str, Content], names: Names) -> Description:
    """A file of `save_lora_weights`, of this or an older Diffusers."""
    content = only(contents, "Diffusers' format")
    alone = _alone(content)
    content = _under(content, alone) if alone else content
    metadata = _metadata(content)
    components: dict[str, dict[str, Layer]] = {}
    for name, words in grouped(content, _cut).items():
        component, _, path = name.partition(".")
        where = f"{content.where}: {name}"
        alpha = words.pop("alpha", None)
        own = metadata.get(component)
        plain = recognise(words, None if alpha is None else float(alpha), where)
        method = plain if own is None else _method(own, path)
        components.setdefault(component, {})[path] = assemble(method, words, where)
    return Description(components)


def _cut(key: str) -> tuple[str, str] | None:
    old = _PROCESSOR.fullmatch(key)
    if old is None:
        return ending(key, WORDS)
    name = old["name"]
    if key.startswith("text_encoder"):
        name = _CLIP_NAMES[name]
    elif name == "to_out":
        name = "to_out.0"
    return f"{old['layer']}.{name}", "lora_A.weight" if old["half"] == "down" else "lora_B.weight"


def _json(content: Content) -> dict[str, Any]:
    """What the metadata says of the adapter; empty where it says nothing."""
    try:
        return dict(json.loads(content.metadata.get(METADATA, "{}")))
    except ValueError as problem:
        raise LorakitError(f"convert: {content.where} has {METADATA} that is no JSON ({problem}).") from problem


def _metadata(content: Content) -> dict[str, dict[str, Any]]:
    """PEFT's configuration per component."""
    result: dict[str, dict[str, Any]] = {}
    for key, value in _json(content).items():
        component, _, option = key.partition(".")
        result.setdefault(component, {})[option] = value
    return result


def _method(config: Mapping[str, Any], path: str) -> Method:
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    rank, alpha = (value_for(pattern, path) for pattern in patterns)
    common = cast(LoRA, spec_from_peft({**config, "peft_type": "LORA", "use_dora": False}))
    spec = LoRA(
        rank=common.rank if rank is None else int(rank),
        alpha=float(common.alpha if alpha is None else alpha),
        rslora=common.rslora,
    )
    return DoRA(inner=spec) if config.get("use_dora") else spec


# -- writing ---------------------------------------------------------------------------------------------------------------


def write(description: Description, target: Target) -> tuple[dict[str, Content], Description]:
    """One file, its configuration in the metadata."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, layers in description.components.items():
        metadata |= {f"{component}.{key}": value for key, value in _config(component, layers).items()}
        for path, layer in layers.items():
            for word, tensor in layer.words().items():
                tensors[f"{component}.{_in_file(component, path)}.{word}"] = tensor
    text = json.dumps(metadata, indent=2, sort_keys=True)
    return {"": Content("", tensors, {"format": "pt", METADATA: text})}, description


def _in_file(component: str, path: str) -> str:
    """CLIP's layers with the level that transformers 5 has taken out: every Diffusers reads it so."""
    return CLIP + path if component.startswith("text_encoder") and path.startswith("encoder.layers.") else path


def _config(component: str, layers: Mapping[str, Layer]) -> dict[str, Any]:
    # by their ends, so that they fit CLIP with and without its lost level
    specs = {path.removeprefix(CLIP): cast(LoRA, layer.inner) for path, layer in layers.items()}
    roots = {spec.rslora for spec in specs.values()}
    if len(roots) > 1:
        raise LorakitError(
            f"convert: some layers of {component} are scaled by rsLoRA's rule and others not; Diffusers has one."
        )

    def exact(path: str) -> str:
        return rf"^(?:{re.escape(CLIP)})?{re.escape(path)}" if component.startswith("text_encoder") else exactly(path)

    rank, ranks = as_patterns({path: spec.rank for path, spec in specs.items()}, exact)
    alpha, alphas = as_patterns({path: spec.alpha for path, spec in specs.items()}, exact)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_dora": all_dora(layers.values(), "Diffusers"),
        "use_rslora": roots.pop(),
        "target_modules": sorted(specs),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


DIFFUSERS = Format(
    name="diffusers",
    title="Diffusers",
    file="pytorch_lora_weights.safetensors",
    suffix=".safetensors",
    holds=("lora", "dora"),
    kinds=(LINEAR, CONVOLUTION),
    about="parts",
    scale="metadata `lora_adapter_metadata`: PEFT's alpha, rank, patterns, rsLoRA per component; 1 without it",
    limits="Parts of a pipeline only. Read also in the older spellings, with `alpha` tensors. A Diffusers before 0.34 does not "
    "read the metadata, and takes every scale for 1.",
    claims=claims,
    read=read,
    write=write,
)
