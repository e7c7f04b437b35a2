"""kohya's sd-scripts, which ComfyUI, Automatic1111 and civitai share: layers of Stable Diffusion by names with underscores.

    lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight   A (rank, in[, k, k])
                                                 .lora_up.weight    B (out, rank[, 1, 1])
                                                 .alpha             a number; the scale is alpha / rank, 1 without it
                                                 .dora_scale        DoRA's magnitudes (out, 1[, 1, 1])

A convolution may be in three parts (`lora_mid`, Tucker): it is the same LoRA with A = mid ∘ down. LyCORIS writes its own
methods under the same names, so both are read here; `lycoris.py` says what more it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorakit.conversion.content import Content
from lorakit.conversion.description import MAGNITUDE, Description, Layer, assemble, convolution, need, recognise
from lorakit.conversion.format import CONVOLUTION, LINEAR, Format, Target, ending, grouped, only
from lorakit.conversion.names import CLIP, Names
from lorakit.conversion.underscores import flat, from_stability, inverted, is_stability, to_stability
from lorakit.core.layout import Convolution, Layout
from lorakit.errors import LorakitError
from lorakit.methods import DoRA, LoRA

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}
WORDS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_mid.weight": "lora_mid.weight",
    "dora_scale": MAGNITUDE,
    "alpha": "alpha",
    **{f"hada_{name}": f"hada_{name}" for name in ["w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"]},
    **{f"lokr_{name}": f"lokr_{name}" for name in ["w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2"]},
    "diff": "full_P",
    "diff_b": "diff_b",
}
"""An ending in the file -> our word; "alpha", "diff_b" and the Tucker cores are taken care of before a layer is assembled."""
SDXL_CONTEXT = 2048
"""Features of the text that SDXL's cross-attention reads, by which its UNet is told from others."""


def claims(content: Content) -> bool:
    return any(key.startswith(tuple(PREFIXES)) for key in content.tensors) and not is_lycoris(content)


def is_lycoris(content: Content) -> bool:
    """Whether the file has tensors that only LyCORIS writes."""
    keys = [key for key in content.tensors if key.startswith(tuple(PREFIXES))]
    ends = (".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".diff", ".lora_mid.weight")
    return any(key.startswith("lycoris_") or key.endswith(ends) for key in keys)


# -- reading -----------------------------------------------------------------------------------------------------------------


def read(contents: Mapping[str, Content], names: Names) -> Description:
    """A file of kohya's or LyCORIS's layout."""
    content = only(contents, "kohya's format")
    components: dict[str, dict[str, Layer]] = {}
    notes: dict[str, None] = {}
    for name, words in grouped(content, lambda key: ending(key, WORDS)).items():
        component, path = layer_named(name, names)
        known = names.of(component)
        layout = known.get(path) if known else None
        layer, said = _layer(words, f"{content.where}: {name}", layout)
        notes.update(dict.fromkeys(said))
        own = components.setdefault(component, {})
        if path in own:
            raise LorakitError(
                f"convert: {content.where} holds {path} of {component or 'the model'} twice, once as {name}."
            )
        own[path] = layer
    return Description(components, None, tuple(notes))


def layer_named(name: str, names: Names) -> tuple[str, str]:
    """`(component, path)` of a layer's name in the file."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        raise LorakitError(f"convert: {name!r} is no layer by kohya's names, which begin with {', '.join(PREFIXES)}.")
    component, rest = PREFIXES[prefix], name.removeprefix(prefix)
    if component == "unet" and is_stability(rest):
        rest = from_stability(rest)
    known = names.of(component)
    if known is not None and component.startswith("text_encoder") and not any(path.startswith(CLIP) for path in known):
        rest = rest.removeprefix(flat(CLIP))
    return component, inverted(rest, known)


def _layer(words: dict[str, Tensor], where: str, layout: Layout | None) -> tuple[Layer, list[str]]:
    words = dict(words)
    alpha = _alpha(words.pop("alpha", None), where)
    shift = words.pop("diff_b", None)
    if shift is not None and shift.any():
        raise LorakitError(
            f"convert: {where}.diff_b changes a bias, which no other format has as a difference. Its weights alone would be "
            "another adapter."
        )
    if "full_P" in words:
        P = words["full_P"]
        if P.ndim < 2:
            raise LorakitError(f"convert: {where}.diff is {tuple(P.shape)}: a norm's vector and no matrix.")
        layout = convolution(P.shape[0], tuple(P.shape[1:])) if P.ndim > 2 else layout
        words["full_P"] = P.flatten(1)
    said = _untucked(words, where)
    if MAGNITUDE in words:
        words[MAGNITUDE] = _magnitudes(words[MAGNITUDE], words, where)
    method = recognise(words, alpha, where, whole_is_one=True)
    # LoHa and LoKr keep a convolution's change as a matrix, so that its kernel is known from the base alone
    flattened = any(word.startswith(("hada_", "lokr_", "full_")) for word in words)
    return assemble(method, words, where, layout if flattened else None), said


def _alpha(value: Tensor | None, where: str) -> float | None:
    if value is None:
        return None
    if value.numel() != 1 or not torch.isfinite(value.float()).all():
        raise LorakitError(f"convert: {where}.alpha is {value.tolist()}; it is one finite number.")
    number = float(value)
    if number == 0.0:
        raise LorakitError(
            f"convert: {where}.alpha is 0, which sd-scripts takes for the rank (a scale of 1) and others for a scale "
            "of 0. Remove it, or set it to what is meant."
        )
    return number


def _untucked(words: dict[str, Tensor], where: str) -> list[str]:
    """Three-part (Tucker) factors of a convolution as two-part ones: the same ΔW at the same rank. Changes `words`."""
    if "lora_mid.weight" in words:
        mid, down = words.pop("lora_mid.weight"), need(words, "lora_A.weight", where)
        words["lora_A.weight"] = torch.einsum("rs...,si->ri...", _wide(mid), _wide(down).flatten(1))
        up = need(words, "lora_B.weight", where)
        words["lora_B.weight"] = up.reshape(*up.shape[:2], *[1] * (mid.ndim - 2))
    elif "hada_t1" in words or "hada_t2" in words:
        _without_core(words, "hada_t1", "hada_w1", where)
        _without_core(words, "hada_t2", "hada_w2", where)
    elif "lokr_t2" in words:
        _without_core(words, "lokr_t2", "lokr_w2", where)
    else:
        return []
    return ["three-part (Tucker) convolutions are written as two-part ones of the same rank, which is the same ΔW"]


def _without_core(words: dict[str, Tensor], core: str, name: str, where: str) -> None:
    out, into, held = (need(words, word, where) for word in (f"{name}_a", f"{name}_b", core))
    del words[core]
    words[f"{name}_a"] = out.T.contiguous()
    words[f"{name}_b"] = torch.einsum("pq...,qi->pi...", _wide(held), _wide(into)).flatten(1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _magnitudes(value: Tensor, words: Mapping[str, Tensor], where: str) -> Tensor:
    """dora_scale (out, 1, …) in PEFT's shape: (out,), or (1, out, 1, …) for a convolution."""
    if value.ndim > 1 and value.shape[0] == 1 and value.numel() > 1:
        raise LorakitError(
            f"convert: {where}.dora_scale is {tuple(value.shape)}: magnitudes of inputs (wd_on_out=False), where lorakit's and "
            "PEFT's DoRA have those of outputs."
        )
    A = words.get("lora_A.weight")
    extra = A.ndim - 2 if A is not None else value.ndim - 2
    return value.reshape(-1) if extra <= 0 else value.reshape(1, -1, *[1] * extra)


# -- writing ---------------------------------------------------------------------------------------------------------------

_KOHYA_WORDS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "full_P": "diff"}


def write(description: Description, target: Target) -> tuple[dict[str, Content], Description]:
    """One file of kohya's layout."""
    stability = is_sdxl(description)
    return write_named(description, lambda component, path: file_name(component, path, stability, description))


def write_named(description: Description, name_of: Callable[[str, str], str]) -> tuple[dict[str, Content], Description]:
    """One file whose layers are called as `name_of(component, path)` says; all methods of LyCORIS."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for component, path, layer in description.layers():
        name = name_of(component, path)
        if name in names:
            raise LorakitError(
                f"convert: {names[name]} and {path} have one name when their dots are underscores ({name}), so that one file "
                "cannot hold both."
            )
        names[name] = path
        for word, tensor in layer.words().items():
            if word == MAGNITUDE:
                window = layer.layout.window if isinstance(layer.layout, Convolution) else (1,)
                tensors[f"{name}.dora_scale"] = tensor.reshape(-1, 1, *[1] * (len(window) - 1))
            elif word == "full_P" and isinstance(layer.layout, Convolution):
                tensors[f"{name}.diff"] = tensor.reshape(-1, *layer.layout.window)
            else:
                tensors[f"{name}.{_KOHYA_WORDS.get(word, word)}"] = tensor
        if layer.rank:
            tensors[f"{name}.alpha"] = alpha_tensor(layer.alpha)
    ranks = {layer.rank for _, _, layer in description.layers()}
    lora = all(isinstance(layer.inner, LoRA) for _, _, layer in description.layers())
    metadata = {"format": "pt", "ss_network_module": "networks.lora" if lora else "lycoris.kohya"}
    if len(ranks) == 1:
        metadata["ss_network_dim"] = str(ranks.pop())
    alphas = {layer.alpha for _, _, layer in description.layers() if layer.rank}
    notes = []
    if len(alphas) > 1:
        notes.append(
            "alphas differ between layers, which Diffusers' reader of this layout does not tell apart; for it, write diffusers"
        )
    if any(isinstance(layer.method, DoRA) for _, _, layer in description.layers()):
        notes.append("Diffusers' reader of this layout leaves DoRA's magnitudes out; for it, write diffusers")
    return {"": Content("", tensors, metadata)}, description.noting(*notes)


def alpha_tensor(alpha: float) -> Tensor:
    """A number as the file has it: in float32 where that is exact, else in float64."""
    narrow = torch.tensor(alpha, dtype=torch.float32)
    return narrow if float(narrow) == alpha else torch.tensor(alpha, dtype=torch.float64)


def is_sdxl(description: Description) -> bool:
    """Whether the UNet is SDXL's, for which sd-scripts uses Stability's names."""
    if "text_encoder_2" in description.components:
        return True
    unet = description.components.get("unet", {})
    reads = [layer.layout.shape.in_ for path, layer in unet.items() if path.endswith(("attn2.to_k", "attn2.to_v"))]
    return SDXL_CONTEXT in reads


def file_name(component: str, path: str, stability: bool, description: Description) -> str:
    """A layer's name in the file."""
    if component == "unet":
        return "lora_unet_" + (to_stability(path, description.components["unet"]) if stability else flat(path))
    if component.startswith("text_encoder"):
        number = component.removeprefix("text_encoder").removeprefix("_") or "1"
        prefix = f"lora_te{number}_" if stability or number != "1" else "lora_te_"
        lost = path.startswith("encoder.layers.")  # transformers 5 has taken a level out of CLIP's names, files keep it
        return prefix + flat(CLIP + path if lost else path)
    return "lora_transformer_" + flat(path)


KOHYA = Format(
    name="kohya",
    title="kohya sd-scripts, ComfyUI, Automatic1111",
    file="one .safetensors file",
    suffix=".safetensors",
    holds=("lora", "dora"),
    kinds=(LINEAR, CONVOLUTION),
    about="parts",
    scale="a tensor `alpha` per layer; the scale is alpha / rank",
    limits="Layers of a diffusion pipeline, linear and convolutions, no embeddings. Names have underscores for dots: "
    "turned back "
    "by known words (Stable Diffusion's UNet and text encoders, SDXL's names of Stability too), else by the base's names.",
    claims=claims,
    read=read,
    write=write,
)
