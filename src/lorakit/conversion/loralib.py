"""loralib's state dict: `LAYER.lora_A` (rank, in) and `LAYER.lora_B` (out, rank), and no scale.

Whoever loads it has built the layers with a rank and lora_alpha in Python, so the file must be told: `alpha=`, or the
`lora_alpha` that lorakit keeps in the file's metadata. It is read from safetensors (loralib itself pickles). Fused layers of
loralib (MergedLinear) pack several factors into one and say nowhere which; they are refused by their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorakit.conversion.content import Content
from lorakit.conversion.description import Description, Layer, as_embedding, assemble, one_number, recognise
from lorakit.conversion.format import EMBEDDING, LINEAR, Format, Target, ending, grouped, only
from lorakit.conversion.names import Names
from lorakit.errors import LorakitError

ALPHA = "lora_alpha"
_WORDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "embedding", "embeddings", "shared"})


def claims(content: Content) -> bool:
    return any(key.endswith(".lora_A") for key in content.tensors)


def read(contents: Mapping[str, Content], names: Names) -> Description:
    """A state dict of `lora_state_dict`, as safetensors; its alpha is in the metadata."""
    content = only(contents, "loralib's format")
    text = content.metadata.get(ALPHA)
    if text is None:
        raise LorakitError(
            f"convert: {content.where} is loralib's, whose file does not say the scale. Give alpha (--alpha): the "
            "lora_alpha of its layers; the scale is alpha / rank."
        )
    layers: dict[str, Layer] = {}
    for path, words in grouped(content, lambda key: ending(key, _WORDS)).items():
        where = f"{content.where}: {path}"
        layout = (names.of("") or {}).get(path)
        if layout is None and path.rpartition(".")[2] in _EMBEDDINGS:
            raise LorakitError(
                f"convert: {path} may be an embedding or a linear layer, which loralib's tensors do not tell; name the "
                "base (--base)."
            )
        if layout is not None and layout.kind == "embedding":
            words = as_embedding(words)
        elif layout is not None and layout.kind == "convolution":
            raise LorakitError(
                f"convert: {path} is a convolution, whose loralib factors (rank · kernel, in · kernel) are another "
                "product than LoRA's of any other tool."
            )
        _refuse_merged(words, where)
        layers[path] = assemble(recognise(words, float(text), where), words, where)
    return Description({"": layers})


def _refuse_merged(words: Mapping[str, Tensor], where: str) -> None:
    A, B = words.get("lora_A.weight"), words.get("lora_B.weight")
    if A is not None and B is not None and A.ndim == B.ndim == 2 and A.shape[0] != B.shape[1]:
        raise LorakitError(
            f"convert: {where} has ranks that do not match: A {tuple(A.shape)}, B {tuple(B.shape)}. If it is loralib's "
            "MergedLinear, its file does not say which parts of the layer are adapted (enable_lora)."
        )


def write(description: Description, target: Target) -> tuple[dict[str, Content], Description]:
    """One file with one alpha."""
    scaled, alpha = one_number(description, "loralib", "alpha")
    tensors: dict[str, Tensor] = {}
    for _, path, layer in scaled.layers():
        tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = layer.tensors["A"], layer.tensors["B"]
    ranks = sorted({layer.rank for _, _, layer in scaled.layers()})
    note = f"loralib's layers are built in Python: lora_alpha={alpha:g}, r={', '.join(map(str, ranks))}; the file does not say"
    return {"": Content("", tensors, {"format": "pt", ALPHA: repr(alpha)})}, scaled.noting(note)


LORALIB = Format(
    name="loralib",
    title="loralib",
    file="one .safetensors file (a state dict)",
    suffix=".safetensors",
    holds=("lora",),
    kinds=(LINEAR, EMBEDDING),
    about="one",
    scale="not in the file: alpha is given when reading (lorakit keeps it in the metadata); one alpha for all layers",
    limits="Linear layers and embeddings of one model. Alphas that differ are multiplied into B. MergedLinear and convolutions "
    "are refused.",
    claims=claims,
    read=read,
    write=write,
)
