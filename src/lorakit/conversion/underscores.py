"""Names in which every dot has become an underscore, turned back.

kohya's tools write `lora_unet_down_blocks_0_attentions_1_proj_in`: which underscore was a dot cannot be told from the name.
With the base's own names it can, unless two of them become one. Without, it can for models whose attributes are known words
(`WORDS`): a name is cut into these in every way there is, and must have exactly one. SDXL adapters of sd-scripts use the
names of Stability's own code (`input_blocks_4_1_…`), which map onto Diffusers' by counting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lorakit.errors import LorakitError

_UNET = (
    "conv_in conv_out time_embedding add_embedding linear_1 linear_2 down_blocks mid_block up_blocks resnets attentions "
    "transformer_blocks downsamplers upsamplers conv conv1 conv2 conv_shortcut time_emb_proj proj_in proj_out attn1 attn2 "
    "to_q to_k to_v to_out ff net proj"
)
_CLIP = "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
_LLAMA = "model lm_head o_proj gate_proj up_proj down_proj"
WORDS = frozenset(f"{_UNET} {_CLIP} {_LLAMA}".split())
"""Attributes on the way to a layer, in models whose names can be cut without the model."""


def flat(path: str) -> str:
    """A path with underscores for dots."""
    return path.replace(".", "_")


def inverted(name: str, known: Iterable[str] | None) -> str:
    """The path whose flat form this is.

    Args:
        name: with underscores for dots.
        known: the layers of the base; None where no base is known.

    Raises:
        LorakitError: no path has this form, or several have.
    """
    paths = [path for path in known if flat(path) == name] if known is not None else cuts(name)
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise LorakitError(
            f"convert: {name!r} can be {' or '.join(sorted(paths)[:3])}. "
            + (
                "Two layers of the base have one name there."
                if known is not None
                else "The base model (--base) decides."
            )
        )
    if known is not None:
        raise LorakitError(
            f"convert: the base has no layer whose name with underscores is {name!r}; the adapter was made for another base."
        )
    raise LorakitError(
        f"convert: {name!r} cannot be cut into layer names without the model: underscores stand for dots there. Name its "
        "base (--base, a folder with config.json is enough)."
    )


def cuts(name: str) -> list[str]:
    """All paths of known words and numbers whose flat form this is."""
    tokens = name.split("_")
    whole: dict[int, list[str]] = {len(tokens): [""]}
    for start in reversed(range(len(tokens))):
        ends = []
        for stop in range(start + 1, len(tokens) + 1):
            word = "_".join(tokens[start:stop])
            if word in WORDS or word.isdigit():
                ends += [f"{word}.{rest}" if rest else word for rest in whole[stop]]
        whole[start] = ends
    return whole[0]


# -- Stability's names ---------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")
_INPUT = re.compile(r"input_blocks_(\d+)_(\d+)_(.+)")
_OUTPUT = re.compile(r"output_blocks_(\d+)_(\d+)_(.+)")
_MID = re.compile(r"middle_block_(\d+)_(.+)")
LAYERS_PER_BLOCK = 2
"""Of the UNets of SD 1, SD 2 and SDXL."""


def is_stability(name: str) -> bool:
    """Whether a flat UNet name is one of Stability's code."""
    return name in _OUTSIDE or any(pattern.fullmatch(name) for pattern in (_INPUT, _OUTPUT, _MID))


def from_stability(name: str) -> str:
    """Diffusers' flat name of a layer that Stability's code calls `name` (flat as well)."""
    if name in _OUTSIDE:
        return flat(_OUTSIDE[name])
    each = LAYERS_PER_BLOCK + 1
    if found := _INPUT.fullmatch(name):
        block, within = divmod(int(found[1]) - 1, each)
        if found[3] == "op":
            return f"down_blocks_{block}_downsamplers_0_conv"
        return f"down_blocks_{block}_" + _inside(int(found[2]), within, found[3])
    if found := _OUTPUT.fullmatch(name):
        block, within = divmod(int(found[1]), each)
        if found[3] == "conv":
            return f"up_blocks_{block}_upsamplers_0_conv"
        return f"up_blocks_{block}_" + _inside(int(found[2]), within, found[3])
    found = _MID.fullmatch(name)
    if found is None or int(found[1]) >= len(_MIDDLE):
        raise LorakitError(f"convert: {name!r} is no layer of a UNet by Stability's names.")
    return f"mid_block_{flat(_MIDDLE[int(found[1])])}_{_RESNET.get(found[2], found[2])}"


def _inside(index: int, within: int, rest: str) -> str:
    if index == 0:
        return f"resnets_{within}_{_RESNET.get(rest, rest)}"
    return f"attentions_{within}_{rest}"


_DOWN_PATH = re.compile(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)")
_UP_PATH = re.compile(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.+)")
_MID_PATH = re.compile(r"mid_block\.((?:resnets|attentions)\.\d)\.(.+)")


def to_stability(path: str, paths: Iterable[str]) -> str:
    """Stability's flat name of a Diffusers path.

    Args:
        path: of one layer.
        paths: of all layers of the adapter; where an up-block has attention, its upsampler is one further on.
    """
    names: Mapping[str, str] = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    resnet = {ours: theirs for theirs, ours in _RESNET.items()}
    if path in names:
        return names[path]
    each = LAYERS_PER_BLOCK + 1
    if found := _DOWN_PATH.fullmatch(path):
        block, kind, within = int(found[1]), found[2], int(found[3])
        if kind == "downsamplers":
            return f"input_blocks_{block * each + each}_0_op"
        rest = resnet.get(found[4], flat(found[4])) if kind == "resnets" else flat(found[4])
        return f"input_blocks_{block * each + within + 1}_{int(kind == 'attentions')}_{rest}"
    if found := _UP_PATH.fullmatch(path):
        block, kind, within = int(found[1]), found[2], int(found[3])
        if kind == "upsamplers":
            attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in paths)
            return f"output_blocks_{block * each + LAYERS_PER_BLOCK}_{1 + int(attention)}_conv"
        rest = resnet.get(found[4], flat(found[4])) if kind == "resnets" else flat(found[4])
        return f"output_blocks_{block * each + within}_{int(kind == 'attentions')}_{rest}"
    found = _MID_PATH.fullmatch(path)
    if found is None or found[1] not in _MIDDLE:
        raise LorakitError(
            f"convert: {path} has no place in a UNet by Stability's names, which SDXL adapters of kohya use."
        )
    return f"middle_block_{_MIDDLE.index(found[1])}_{resnet.get(found[2], flat(found[2]))}"
