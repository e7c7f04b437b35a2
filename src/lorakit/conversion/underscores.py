"""Names in which every dot has become an underscore, turned back.

kohya's tools write `lora_unet_down_blocks_0_attentions_1_proj_in`: which underscore was a dot cannot be told from the name.
With the base's own names it can, unless two of them become one. Without, it can for models whose attributes are known words
(`WORDS`): a name is cut into these in every way there is, and must have exactly one. SDXL adapters of sd-scripts use the
names of Stability's own code (`input_blocks_4_1_…`), which map onto Diffusers' by counting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorakit.errors import LorakitError

_UNET = (
    "conv_in conv_out time_embedding add_embedding linear_1 linear_2 down_blocks mid_block up_blocks resnets attentions "
    "transformer_blocks downsamplers upsamplers conv conv1 conv2 conv_shortcut time_emb_proj proj_in proj_out attn1 attn2 "
    "to_q to_k to_v to_out ff net proj"
)
_CLIP = "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
_TRANSFORMER = "single_transformer_blocks attn add_q_proj add_k_proj add_v_proj to_add_out ff_context"
_LLAMA = "model lm_head o_proj gate_proj up_proj down_proj"
WORDS = frozenset(f"{_UNET} {_TRANSFORMER} {_CLIP} {_LLAMA}".split())
"""Attributes on the way to a layer, in models whose names can be cut without the model."""


_ORIGINAL = re.compile(
    r"diffusion_model\.|(?:double|single|joint)_blocks?[._]|.+\.processor\.\w*lora\d|blocks_\d+_(?:self|cross)_attn_"
)


def original(name: str) -> str:
    """What to say of a name that the model's original code has, and Diffusers does not; empty for others."""
    if not _ORIGINAL.match(name):
        return ""
    return (
        " Its layers are named as in the model's original code. Diffusers turns such names into its own: "
        "load_lora_weights(file) of the pipeline, then save_lora_adapter(folder) of its transformer; that file converts."
    )


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
            f"convert: the base has no layer whose name with underscores is {name!r}; the adapter was made for another base"
            f"{' or under other names.' + original(name) if original(name) else '.'}"
        )
    raise LorakitError(
        f"convert: {name!r} cannot be cut into layer names without the model: underscores stand for dots there. Name its "
        f"base (--base, a folder with config.json is enough).{original(name)}"
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

_EACH = 3
"""Modules of a block that Stability's code numbers: two layers and a sampler down, or three layers up (SD 1, SD 2, SDXL)."""
_MODULES = {"middle_block_0": "mid_block_resnets_0", "middle_block_1": "mid_block_attentions_0"}
_MODULES["middle_block_2"] = "mid_block_resnets_1"
_WHOLE = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
"""Stability's flat names of modules and of whole layers -> Diffusers' flat ones."""
for _block in range(4):
    for _index, _kind in enumerate(("resnets", "attentions")):
        for _layer in range(_EACH - 1):
            _MODULES[f"input_blocks_{_block * _EACH + _layer + 1}_{_index}"] = f"down_blocks_{_block}_{_kind}_{_layer}"
        for _layer in range(_EACH):
            _MODULES[f"output_blocks_{_block * _EACH + _layer}_{_index}"] = f"up_blocks_{_block}_{_kind}_{_layer}"
    _WHOLE[f"input_blocks_{_block * _EACH + _EACH}_0_op"] = f"down_blocks_{_block}_downsamplers_0_conv"
    for _index in (1, 2):  # it comes after the attention of its block, where there is one
        _WHOLE[f"output_blocks_{_block * _EACH + _EACH - 1}_{_index}_conv"] = f"up_blocks_{_block}_upsamplers_0_conv"
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_THEIRS = re.compile(r"((?:input|output)_blocks_\d+_\d+|middle_block_\d+)_(.+)")
_OURS = re.compile(r"((?:(?:down|up)_blocks_\d+|mid_block)_(?:resnets|attentions)_\d+)_(.+)")


def is_stability(name: str) -> bool:
    """Whether a flat UNet name is one of Stability's code."""
    return name in _WHOLE or _THEIRS.fullmatch(name) is not None


def from_stability(name: str) -> str:
    """Diffusers' flat name of a layer that Stability's code calls `name` (flat as well)."""
    if name in _WHOLE:
        return _WHOLE[name]
    found = _THEIRS.fullmatch(name)
    if found is None or found[1] not in _MODULES:
        raise LorakitError(f"convert: {name!r} is no layer of a UNet by Stability's names.")
    return f"{_MODULES[found[1]]}_{_RESNET.get(found[2], found[2])}"


def to_stability(path: str, paths: Iterable[str]) -> str:
    """Stability's flat name of a Diffusers path.

    Args:
        path: of one layer.
        paths: of all layers of the adapter; where an up-block has attention, its upsampler is one further on.
    """
    name = flat(path)
    whole = [theirs for theirs, ours in _WHOLE.items() if ours == name]
    if whole:
        block = path.partition(".upsamplers.")[0]
        return whole[-1 if any(other.startswith(f"{block}.attentions.") for other in paths) else 0]
    found = _OURS.fullmatch(name)
    module = next((theirs for theirs, ours in _MODULES.items() if found and ours == found[1]), None)
    if found is None or module is None:
        raise LorakitError(
            f"convert: {path} has no place in a UNet by Stability's names, which SDXL adapters of kohya use."
        )
    inside = next((theirs for theirs, ours in _RESNET.items() if ours == found[2]), found[2])
    return f"{module}_{inside}"
