"""The layers of a base model by name, without its weights: what turns other tools' names back, and tells a wrong base.

A base is given as a module, a list of layer names, a folder (one model, or a Diffusers pipeline with a folder per
component), a GGUF file, or a name on the hub. Folders are read by their configuration: the model is made on the meta device,
which costs no memory and no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lorakit.conversion.content import open_gguf
from lorakit.conversion.description import Description, Layer
from lorakit.conversion.experts import EXPERT, split
from lorakit.core.layout import Convolution, Layout
from lorakit.core.sites import adaptable_sites
from lorakit.core.walking import walk
from lorakit.errors import LorakitError, unknown
from lorakit.files.experts import Stack, stacks_of
from lorakit.models.stored import skeleton
from lorakit.reading import read_json

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a diffusion pipeline that adapters are made for, by Diffusers' names; "" is a model by itself."""
_CLASSES = {
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
CLIP = "text_model."
"""A level of CLIP's text model that transformers 5 has taken out of its names, and files keep."""


@dataclass(frozen=True)
class Names:
    """What is known of the base model.

    Attributes:
        components: component -> path -> layout; None where only names were given. Empty: no base was given.
        config: the configuration of a model by itself, as transformers has it.
        stacks: parameter -> the stack of experts that it is, of a model by itself.
        name: how the base was named.
    """

    components: dict[str, dict[str, Layout | None]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    name: str | None = None

    def of(self, component: str) -> dict[str, Layout | None] | None:
        """The layers of one component, None where no base was given.

        Raises:
            LorakitError: a base was given, and has no such component.
        """
        if not self.components:
            return None
        if component not in self.components:
            if list(self.components) == [""]:  # names, or a model of a class that no pipeline has: taken at its word
                return self.components[""]
            raise LorakitError(
                f"convert: the adapter changes {component or 'a model by itself'!r}, and the base that was named has "
                f"{', '.join(repr(one) for one in self.components)}."
            )
        return self.components[component]

    def _is_expert(self, path: str) -> bool:
        """Whether a path is a matrix of one of the base's experts, which is no layer of the base but a part of a stack."""
        module = path.rpartition(".")[0].rpartition(".")[0]
        return any(place.rpartition(".")[0] == module for place in self.stacks)

    def checked(self, description: Description) -> Description:
        """The description under the base's own names and layouts.

        Raises:
            LorakitError: the base has no layer of a name, or one of another shape or kind.
        """
        if not self.components:
            return description
        components: dict[str, dict[str, Layer]] = {}
        for component, layers in description.components.items():
            own = components.setdefault(component, {})
            known = self.of(component) or {}
            for path, layer in layers.items():
                stack = self.stacks.get(path.rpartition(".")[0])
                if stack is not None:
                    own |= split(path, layer, stack)
                    continue
                if layer.layout.kind == EXPERT or self._is_expert(path):
                    own[path] = layer  # checked where it is put together
                    continue
                # with or without the level that CLIP has lost
                name = next((one for one in (path, CLIP + path, path.removeprefix(CLIP)) if one in known), None)
                if name is None:
                    raise _no_layer(component, path, known)
                own[name] = _on(known[name], layer, name)
        return replace(description, components=components)


def _no_layer(component: str, path: str, known: Mapping[str, Any]) -> LorakitError:
    about = f"layer of the base's {component}" if component else "layer of the base"
    near = [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]] or list(known)
    problem = unknown(about, path, near[:8])
    return LorakitError(f"convert: {problem} The adapter was made for another base, or under other names.")


def _on(layout: Layout | None, layer: Layer, path: str) -> Layer:
    """The layer with the base's own layout."""
    if layout is None:
        return layer
    ours, theirs = layout.shape, layer.layout.shape
    same = (ours.out, ours.in_) == (theirs.out, theirs.in_)
    if isinstance(layout, Convolution) and isinstance(layer.layout, Convolution):
        same = same and layout.window == layer.layout.window
    if not same:
        raise LorakitError(
            f"convert: {path} is {ours.out} × {ours.in_} in the base, and the adapter's is {theirs.out} × {theirs.in_}: it was "
            "made for another base."
        )
    if (layout.kind == "embedding") != (layer.layout.kind == "embedding"):
        raise LorakitError(
            f"convert: {path} is a {layout.kind} layer, and the adapter's is for a {layer.layout.kind} one."
        )
    return replace(layer, layout=layout)


# -- finding ---------------------------------------------------------------------------------------------------------------


def names_of(base: Any) -> Names:
    """What a base says about names.

    Args:
        base: None, a module, {component: module}, layer names, or the path or hub name of a model or pipeline.

    Raises:
        LorakitError: it is none of these, or cannot be read.
    """
    if base is None:
        return Names()
    if isinstance(base, Names):
        return base
    if isinstance(base, nn.Module):
        config: Any = getattr(base, "config", None)
        values = dict(config.to_dict()) if hasattr(config, "to_dict") else dict(config or {})
        stacks = {f"{path}.{name}": stack for path, module in walk(base) for name, stack in stacks_of(module).items()}
        component = component_of(type(base).__name__)
        return Names({component: _layers(base)}, values, stacks, getattr(base, "name_or_path", None))
    if isinstance(base, Mapping):
        return Names({component: _layers(module) for component, module in base.items()})
    if isinstance(base, str | Path):
        return _from_path(base)
    if isinstance(base, Iterable):
        return Names({"": {str(name): None for name in base}})
    raise LorakitError(
        f"convert: base was given as a {type(base).__name__}; it is a model, a list of layer names, or the path of a model or "
        "pipeline."
    )


def component_of(name: str) -> str:
    """The component of a pipeline that a model of this class is."""
    if name.endswith(("Transformer2DModel", "Transformer3DModel")):
        return "transformer"
    return _CLASSES.get(name, "")


def guess_component(paths: Iterable[str]) -> str:
    """The component whose naming these paths follow; "" where they follow none that is particular."""
    first = {path.partition(".")[0] for path in paths}
    if first & {"down_blocks", "up_blocks", "mid_block"}:
        return "unet"
    if first & {"transformer_blocks", "single_transformer_blocks"}:
        return "transformer"
    clip = ("text_model.encoder.layers.", "encoder.layers.")
    if all(path.startswith(clip) and (".self_attn." in path or ".mlp." in path) for path in paths):
        return "text_encoder"
    return ""


def _layers(model: nn.Module) -> dict[str, Layout | None]:
    layers: dict[str, Layout | None] = {}
    for path, module in walk(model):
        sites = adaptable_sites(module) if path else []
        if len(sites) == 1:
            layers[path] = sites[0].layout
    return layers


def _from_path(base: str | Path) -> Names:
    path = Path(base).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Names(config=_gguf_config(path), name=str(base))
    if path.is_dir() and (path / "model_index.json").is_file():
        found = {name: path / name for name in COMPONENTS if (path / name / "config.json").is_file()}
        models = {component: _on_meta(folder) for component, folder in found.items()}
        return Names({component: _layers(model) for component, model in models.items()}, name=str(base))
    if path.is_dir() and not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf"))
        if len(gguf) == 1:
            return _from_path(gguf[0])
        raise LorakitError(f"convert: {path} is no base model: it has neither config.json nor model_index.json.")
    if path.exists() and not path.is_dir():
        raise LorakitError(f"convert: {path} is no base model; a folder with config.json, or a .gguf file, is one.")
    model = _on_meta(path if path.is_dir() else str(base))
    named = names_of(model)
    return replace(named, name=str(base))


def _on_meta(where: str | Path) -> nn.Module:
    """The model of a configuration, on the meta device."""
    config = Path(where) / "config.json" if isinstance(where, Path) else None
    values = read_json(config, "convert") if config is not None else {}
    if "_class_name" in values:
        try:
            import diffusers
        except ImportError as problem:
            raise LorakitError(
                f"convert: {where} is a model of Diffusers, which is not installed: pip install diffusers."
            ) from problem
        kind: Any = getattr(diffusers, values["_class_name"], None)
        if kind is None:
            raise LorakitError(f"convert: {config} is of class {values['_class_name']}, which Diffusers does not have.")
        with torch.device("meta"):
            return cast(nn.Module, kind.from_config(values))
    try:
        return skeleton(where, guess=True)
    except (OSError, ValueError) as problem:
        line = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise LorakitError(
            f"convert: the base {str(where)!r} cannot be read by its configuration ({line}). A folder with config.json works, "
            "or a name on the hub that is in the cache."
        ) from problem


def _gguf_config(path: Path) -> dict[str, Any]:
    """Of a GGUF model, what conversion asks: the architecture and how many heads it has, in transformers' words."""
    with open_gguf(path) as reader:
        fields, tensors = reader.fields, [tensor.name for tensor in reader.tensors]

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    architecture = value("general.architecture")
    heads = value(f"{architecture}.attention.head_count")
    return {
        "gguf_architecture": architecture,
        "num_attention_heads": heads,
        "num_key_value_heads": value(f"{architecture}.attention.head_count_kv") or heads,
        "num_hidden_layers": value(f"{architecture}.block_count"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
