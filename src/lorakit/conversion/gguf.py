"""GGUF adapters of llama.cpp: `blk.3.attn_q.weight.lora_a` (rank, in) and `.lora_b` (out, rank), in float32.

    adapter.lora.alpha      one number; the scale is alpha / the rank of each tensor

llama.cpp names layers of every architecture in one way, and for Llama's it turns the rows of q and k within each head
from halves to pairs, since its rotary embedding rotates neighbours: row (half h, place j) of a head goes to row 2 j + h.
B's rows go the same way. The embedding's A is kept transposed. The base's configuration says which architecture, and how
many heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from lorakit.conversion.content import Content
from lorakit.conversion.description import Description, Layer, as_embedding, assemble, need, one_number, recognise
from lorakit.conversion.experts import EXPERT, apart, count_of, expert_layout, stacked, unstacked
from lorakit.conversion.format import EMBEDDING, LINEAR, Format, Target, ending, grouped, only
from lorakit.conversion.names import Names
from lorakit.errors import LorakitError

ALPHA = "adapter.lora.alpha"
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MIXTURE = {name: _BLOCK[name] for name in _BLOCK if name.startswith("self_attn")}
_SHARED = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
"""An expert's matrices; A is (experts, rank, in), B (experts, out, rank)."""
_OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_WORDS = {"weight.lora_a": "lora_A.weight", "weight.lora_b": "lora_B.weight"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a family of models.

    Attributes:
        name: its architecture in llama.cpp.
        block: transformers' name of a layer within a block -> llama.cpp's.
        turned: whether rows of q and k are reordered.
    """

    name: str
    block: Mapping[str, str]
    turned: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", _BLOCK, turned=True),
    "mistral": Architecture("llama", _BLOCK, turned=True),
    "qwen2": Architecture("qwen2", _BLOCK),
    "qwen3": Architecture("qwen3", _BLOCK),
    "gemma": Architecture("gemma", _BLOCK),
    "gemma2": Architecture("gemma2", _BLOCK),
    "gemma3_text": Architecture("gemma3", _BLOCK),
    "phi3": Architecture("phi3", _FUSED),
    "mixtral": Architecture("llama", _BLOCK, turned=True),
    "qwen2_moe": Architecture("qwen2moe", {**_MIXTURE, **_SHARED}),
    "qwen3_moe": Architecture("qwen3moe", _MIXTURE),
    "olmoe": Architecture("olmoe", _MIXTURE),
    "gpt_oss": Architecture("gpt-oss", _MIXTURE),
}
"""transformers' model_type -> llama.cpp's way."""
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
"""Those of them that have experts."""


def claims(content: Content) -> bool:
    return "general.architecture" in content.metadata


def turned(rows: Tensor, heads: int, back: bool = False) -> Tensor:
    """The rows of a (out, …) tensor of q or k in llama.cpp's order, or from it back."""
    half, odd = divmod(rows.shape[0], 2 * heads)
    if odd:
        raise LorakitError(
            f"convert: {rows.shape[0]} rows of q or k are no {heads} heads of an even size; the base's configuration is of "
            "another model."
        )
    inner = (half, 2) if back else (2, half)
    return rows.reshape(heads, *inner, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _heads(config: Mapping[str, Any], path: str) -> int | None:
    """How many heads the rows of this layer are, where it is a q or a k."""
    asked = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(path.rpartition(".")[2])
    return None if asked is None else int(config.get(asked) or config["num_attention_heads"])


def _configured(names: Names, why: str) -> Mapping[str, Any]:
    config: Mapping[str, Any] = names.config.get("text_config") or names.config
    if "num_attention_heads" not in config:
        raise LorakitError(
            f"convert: {why} needs the number of attention heads: pass --base (a folder with config.json, its GGUF file, or a "
            "name on the hub)."
        )
    return config


# -- reading -----------------------------------------------------------------------------------------------------------------


def read(contents: Mapping[str, Content], names: Names) -> Description:
    """An adapter as llama.cpp's own converter writes it."""
    content = only(contents, "GGUF")
    metadata = content.metadata
    if metadata.get("general.type") != "adapter" or metadata.get("adapter.type") != "lora":
        raise LorakitError(
            f"convert: {content.where} is a GGUF file of type {metadata.get('general.type', 'model')!r}, and no LoRA adapter."
        )
    if "adapter.alora.invocation_tokens" in metadata:
        raise LorakitError(f"convert: {content.where} is an activated LoRA, which acts from certain tokens on only.")
    known = {one.name: one for one in reversed(ARCHITECTURES.values())}
    name = str(metadata["general.architecture"])
    if name not in known:
        raise LorakitError(
            f"convert: {content.where} is for llama.cpp's architecture {name!r}; lorakit knows {', '.join(known)}."
        )
    architecture = known[name]
    inside = {theirs: ours for ours, theirs in architecture.block.items()}
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    experts = {theirs: ours for ours, theirs in _EXPERTS.items()}
    layers: dict[str, Layer] = {}
    for name, words in grouped(content, lambda key: ending(key, _WORDS)).items():
        where = f"{content.where}: {name}"
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
        alpha = float(metadata.get(ALPHA) or 0.0) or None  # llama.cpp takes none, or zero, for a scale of 1
        if found and found[2] in experts:
            A, B = need(words, "lora_A.weight", where), need(words, "lora_B.weight", where)
            for index, (one, other) in enumerate(unstacked(A, B, where)):
                own = {"lora_A.weight": one, "lora_B.weight": other}
                layer = assemble(recognise(own, alpha, where), own, where)
                place = f"model.layers.{found[1]}.mlp.experts.{index}.{experts[found[2]]}"
                layers[place] = expert_layout(layer, index, len(A))
            continue
        if found and found[2] in inside:
            path = f"model.layers.{found[1]}.{inside[found[2]]}"
        elif name in outside:
            path = outside[name]
        else:
            raise LorakitError(
                f"convert: {where} is no layer that lorakit knows of {architecture.name}; it knows "
                f"{', '.join([*inside, *outside])}."
            )
        if architecture.turned and path.endswith(("q_proj", "k_proj")) and "lora_B.weight" in words:
            heads = cast(int, _heads(_configured(names, f"reading {content.where}, a GGUF adapter,"), path))
            words = {**words, "lora_B.weight": turned(words["lora_B.weight"], heads, back=True)}
        if name == "token_embd" and "lora_A.weight" in words:
            words = as_embedding(words)
            words["lora_embedding_A"] = words["lora_embedding_A"].T.contiguous()
        layers[path] = assemble(recognise(words, alpha, where), words, where)
    return Description({"": layers})


# -- writing ---------------------------------------------------------------------------------------------------------------


def write(description: Description, target: Target) -> tuple[dict[str, Content], Description]:
    """One file for the base's architecture."""
    config = _configured(target.names, "writing a GGUF adapter")
    kind = config.get("model_type") or config.get("gguf_architecture")
    if kind not in ARCHITECTURES:
        raise LorakitError(
            f"convert: the base is of type {kind!r}; lorakit knows how llama.cpp has {', '.join(ARCHITECTURES)}. Others go by "
            "llama.cpp's own convert_lora_to_gguf.py, from PEFT's format."
        )
    architecture = ARCHITECTURES[str(kind)]
    scaled, alpha = one_number(description, "GGUF", "alpha")
    tensors: dict[str, Tensor] = {}
    (layers,) = scaled.components.values()
    plain, experts = apart(layers)
    for module, matrices in experts.items():
        block = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.mlp\.experts", module)
        if block is None or kind not in MIXTURES:
            raise LorakitError(
                f"convert: {module} has experts, which lorakit knows llama.cpp's names of for {', '.join(MIXTURES)}; the base "
                f"is of type {kind!r}. Merge the adapter into its base (lorakit merge), and convert the model."
            )
        for name, own in matrices.items():
            rank = max(layer.rank for layer in own.values())
            level = {index: layer.scaled(alpha / rank) for index, layer in own.items()}
            A, B = stacked(level, count_of(own, module, target.names.stacks), rank)
            stem = f"blk.{block[1]}.{_EXPERTS[name]}.weight"
            tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"] = A, B
    for path, layer in plain.items():
        name = _name(path, architecture, config)
        A, B = layer.tensors["A"], layer.tensors["B"]
        heads = _heads(config, path)
        if architecture.turned and heads is not None:
            B = turned(B, heads)
        tensors[f"{name}.weight.lora_a"] = A.T.contiguous() if layer.layout.kind == "embedding" else A
        tensors[f"{name}.weight.lora_b"] = B
    metadata = {
        "general.architecture": architecture.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA: float(alpha),
    }
    if target.base:
        scaled = scaled.noting(f"made for {target.base}; llama.cpp checks the architecture and the shapes alone")
    return {"": Content("", tensors, metadata)}, scaled


def _name(path: str, architecture: Architecture, config: Mapping[str, Any]) -> str:
    plain = path.replace("model.language_model.", "model.", 1)
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", plain)
    if found and found[2] in architecture.block:
        return f"blk.{found[1]}.{architecture.block[found[2]]}"
    if plain in _OUTSIDE:
        if config.get("tie_word_embeddings"):
            raise LorakitError(
                f"convert: {path} shares its weight with {'lm_head' if plain != 'lm_head' else 'the embedding'} in this base, "
                "and llama.cpp has one tensor for both, so that the adapter would act at both places or at none."
            )
        return _OUTSIDE[plain]
    raise LorakitError(
        f"convert: llama.cpp's {architecture.name} has no layer for {path}; it has "
        f"{', '.join([*architecture.block, *_OUTSIDE])}."
    )


GGUF = Format(
    name="gguf",
    title="llama.cpp",
    file="one .gguf file",
    suffix=".gguf",
    holds=("lora",),
    kinds=(LINEAR, EMBEDDING, EXPERT),
    about="one",
    scale="`adapter.lora.alpha`, one for all; the scale is alpha / each tensor's rank",
    limits="Language models of these types: "
    + ", ".join(ARCHITECTURES)
    + "; with experts in "
    + ", ".join(MIXTURES)
    + ". Needs the base's configuration. Linear layers "
    "(embedding and head where they are not tied). Alphas that differ are multiplied into B. No DoRA. Float32.",
    claims=claims,
    read=read,
    write=write,
)
