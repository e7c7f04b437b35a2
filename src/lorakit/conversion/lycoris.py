"""LyCORIS: kohya's layout with more methods: LoHa, LoKr, whole matrices, DoRA over any of them.

    NAME.hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b     B1 (out, rank), A1 (rank, in), B2, A2
    NAME.lokr_w1 or lokr_w1_a, lokr_w1_b                C, or the two whose product it is
    NAME.lokr_w2 or lokr_w2_a, lokr_w2_b                D
    NAME.diff                                           ΔW itself

Three traps. The scale counts once: ΔW = alpha / rank · …, as its layers compute it, though its `get_diff_weight` (used to
merge) multiplies by it a second time. A LoKr with both matrices whole has scale 1, whatever alpha its file has. With
rsLoRA the file's alpha is the asked one times √rank, so that alpha / rank is the scale in every case. (A whole LoKr trained
with rsLoRA has √rank while it trains, and 1 when LyCORIS reads its file: the file does not say, and is read as LyCORIS does.)
"""

from __future__ import annotations

from lorakit.conversion.content import Content
from lorakit.conversion.description import EVERY, Description, Layer
from lorakit.conversion.format import CONVOLUTION, LINEAR, Format, Target
from lorakit.conversion.kohya import file_name, is_lycoris, is_sdxl, read, write_named
from lorakit.conversion.underscores import flat
from lorakit.errors import LorakitError
from lorakit.methods import LoKr


def write(description: Description, target: Target) -> tuple[dict[str, Content], Description]:
    """One file; the layers of a model by itself get the prefix of LyCORIS's own wrapper."""
    stability = is_sdxl(description)
    for _, path, layer in description.layers():
        if layer.inner.name == "full" and not target.names.components:
            raise LorakitError(
                f"convert: {path} is a whole matrix, which LyCORIS keeps in the shape of the layer's weight; name the "
                "base (--base), so that it is known where that is a convolution."
            )

    def name(component: str, path: str) -> str:
        return file_name(component, path, stability, description) if component else "lycoris_" + flat(path)

    return write_named(description.mapped(_whole_at_one), name)


def _whole_at_one(component: str, path: str, layer: Layer) -> Layer:
    """A LoKr with both matrices whole has scale 1 in LyCORIS, so another one goes into C."""
    inner = layer.inner
    if not isinstance(inner, LoKr) or not {"C", "D"} <= set(layer.tensors) or layer.scale == 1.0:
        return layer
    return layer.over(inner.replace(alpha=float(inner.rank)), C=layer.tensors["C"] * layer.scale)


LYCORIS = Format(
    name="lycoris",
    title="LyCORIS, ComfyUI",
    file="one .safetensors file",
    suffix=".safetensors",
    holds=EVERY,
    kinds=(LINEAR, CONVOLUTION),
    about="any",
    scale="a tensor `alpha` per layer; the scale is alpha / rank, once; 1 where LoKr's matrices are both whole",
    limits="No embeddings, no changes of biases and norms. A model by itself has the prefix `lycoris_`, and is read "
    "back by its "
    "base's names.",
    claims=is_lycoris,
    read=read,
    write=write,
)
