"""MLX (mlx-lm): a folder with adapters.safetensors and adapter_config.json; every matrix is transposed.

    model.layers.3.self_attn.q_proj.lora_a      (in, rank)
                                   .lora_b      (rank, out)
                                   .m           DoRA's magnitudes (out,)
    lora_parameters: rank, scale, keys          one for all layers; the scale multiplies as it is

Layers that the configuration selects and the file leaves out start at zero there, and change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.conversion.content import Content, write_mlx
from lorakit.conversion.description import (
    MAGNITUDE,
    Description,
    Layer,
    as_embedding,
    assemble,
    need,
    one_number,
    recognise,
)
from lorakit.conversion.experts import EXPERT, MATRICES, apart, count_of, expert_layout, stacked, unstacked
from lorakit.conversion.format import LINEAR, Format, Target, all_dora, ending, grouped, only
from lorakit.conversion.names import Names
from lorakit.errors import LorakitError, plural
from lorakit.methods import DoRA

_WORDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": MAGNITUDE}
_BLOCK = re.compile(r"model\.layers\.\d+\.(.+)")
EMBEDDING = "model.embed_tokens"
_CONTAINERS = {
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"), "mlp.switch_mlp"
    ),
    **dict.fromkeys(("mixtral", "phimoe", "granitemoe"), "block_sparse_moe.switch_mlp"),
    **dict.fromkeys(("gpt_oss", "afmoe", "dots1"), "mlp.experts"),
    "llama4_text": "feed_forward.experts",
}
"""transformers' model_type -> the module of a block in which mlx-lm has the experts. A (experts, rank, in) and B (experts,
out, rank) are not turned there."""
HEAD = "lm_head"


def claims(content: Content) -> bool:
    return "lora_parameters" in content.config or "fine_tune_type" in content.config


# -- reading -----------------------------------------------------------------------------------------------------------------


def read(contents: Mapping[str, Content], names: Names) -> Description:
    """A folder of mlx-lm's training."""
    content = only(contents, "MLX's format")
    rank, scale = _parameters(content)
    dora = content.config.get("fine_tune_type", "lora") == "dora"
    layers: dict[str, Layer] = {}
    cut = 0
    for path, words in grouped(content, lambda key: ending(key, _WORDS)).items():
        where = f"{content.where}: {path}"
        if any(tensor.ndim == 3 for tensor in words.values()) and not dora:
            module = _module(path, where)
            A, B = need(words, "lora_A.weight", where), need(words, "lora_B.weight", where)
            for index, (one, other) in enumerate(unstacked(A, B, where)):
                own = {"lora_A.weight": one, "lora_B.weight": other}
                layer = _without_padding(assemble(recognise(own, scale * rank, where), own, where))
                place = f"{module}.{index}.{path.rpartition('.')[2]}"
                layers[place] = expert_layout(layer, index, len(A))
            continue
        words = {word: tensor if word == MAGNITUDE else _turned(tensor, where) for word, tensor in words.items()}
        if dora != (MAGNITUDE in words):
            raise LorakitError(
                f"convert: {where} has {', '.join(sorted(words))}, and the configuration says fine_tune_type="
                f"{content.config.get('fine_tune_type', 'lora')!r}."
            )
        if path == EMBEDDING:
            words = as_embedding(words)
        layer = assemble(recognise(words, scale * rank, where), words, where)
        if layer.rank != rank:
            raise LorakitError(f"convert: {where} is of rank {layer.rank}, and the configuration says rank {rank}.")
        layers[path] = _without_padding(layer)
        cut += layers[path].rank != rank
    said = f"{plural(cut, 'layer')}: pairs of rows and columns that are all zero left out, which changes nothing"
    return Description({"": layers}, content.config.get("model"), (said,) if cut else ())


def _module(path: str, where: str) -> str:
    """The module of the experts of a stack, by transformers' name."""
    for container in dict.fromkeys(_CONTAINERS.values()):
        block = re.fullmatch(rf"(model\.layers\.\d+\.){re.escape(container)}\.({'|'.join(MATRICES)})", path)
        if block:
            return block[1] + ("feed_forward.experts" if container.startswith("feed") else "mlp.experts")
    raise LorakitError(
        f"convert: {where} has a factor of experts held together, under a name that is none of mlx-lm's mixtures "
        f"({', '.join(dict.fromkeys(_CONTAINERS.values()))})."
    )


def _parameters(content: Content) -> tuple[int, float]:
    kind = content.config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise LorakitError(
            f"convert: {content.where} is of fine_tune_type {kind!r}: whole weights and no change of any. lorakit "
            "extracts a LoRA from a fine-tuned model and its base."
        )
    parameters = content.config.get("lora_parameters") or {}
    missing = [name for name in ("rank", "scale") if name not in parameters]
    if missing:
        raise LorakitError(
            f"convert: the adapter_config.json beside {content.where} has no {missing[0]} in lora_parameters (it has "
            f"{', '.join(parameters) or 'nothing'})."
        )
    if parameters.get("alpha") not in (None, parameters["rank"]):
        raise LorakitError(
            f"convert: lora_parameters beside {content.where} has alpha={parameters['alpha']} as well as scale="
            f"{parameters['scale']}: the first mlx-lm multiplied by both, today's by scale alone. Remove alpha, or put scale · "
            "alpha / rank into scale, whichever trained it."
        )
    return int(parameters["rank"]), float(parameters["scale"])


def _turned(tensor: Tensor, where: str) -> Tensor:
    if tensor.ndim != 2:
        raise LorakitError(
            f"convert: {where} has a factor of {tuple(tensor.shape)}: experts held together, for which other formats "
            "have no word."
        )
    return tensor.T.contiguous()


def _without_padding(layer: Layer) -> Layer:
    """Without the ranks at the end whose row of A and column of B are both all zero: what writing has added."""
    A, B = layer.tensors["A"], layer.tensors["B"]
    used = (A != 0).any(1) | (B != 0).any(0)
    rank = int(used.nonzero().max()) + 1 if used.any() else layer.rank
    if rank == layer.rank:
        return layer
    return layer.over(layer.inner.replace(rank=rank, alpha=layer.scale * rank), A=A[:rank], B=B[:, :rank])


# -- writing ---------------------------------------------------------------------------------------------------------------


def write(description: Description, target: Target) -> tuple[dict[str, Content], Description]:
    """A folder with one rank and one scale."""
    scaled, scale = one_number(description, "MLX", "scale")
    (layers,) = scaled.components.values()
    dora = all_dora(layers.values(), "MLX")
    layers, experts = apart(layers)
    if dora and experts:
        raise LorakitError(
            f"convert: {next(iter(experts))} has experts under DoRA, which MLX has for single layers only."
        )
    rank = max(layer.rank for _, _, layer in scaled.layers())
    tensors: dict[str, Tensor] = {}
    keys: dict[str, None] = {}
    for path, layer in layers.items():
        keys[_key(path, layer, target.names)] = None
        A, B = layer.tensors["A"], layer.tensors["B"]
        A = torch.cat([A, A.new_zeros(rank - A.shape[0], A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], rank - B.shape[1])], dim=1)
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = A.T.contiguous(), B.T.contiguous()
        if "m" in layer.tensors:
            tensors[f"{path}.m"] = layer.tensors["m"]
    for module, matrices in experts.items():
        container = _container(module, target.names)
        block = module.removesuffix(".feed_forward.experts").removesuffix(".mlp.experts")
        for name, own in matrices.items():
            keys[f"{container}.{name}"] = None
            place = f"{block}.{container}.{name}"
            A, B = stacked(own, count_of(own, module, target.names.stacks), rank)
            tensors[f"{place}.lora_a"], tensors[f"{place}.lora_b"] = A, B
    if smaller := sum(layer.rank != rank for _, _, layer in scaled.layers()):
        padded = f"{plural(smaller, 'layer')} of a smaller rank filled up with zeros to {rank}"
        scaled = scaled.noting(f"MLX has one rank: {padded}, which changes nothing")
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": target.base or description.base,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(keys)},
    }
    return {"": Content("", tensors, {"format": "mlx"}, config)}, scaled


def _container(module: str, names: Names) -> str:
    """Where mlx-lm has the experts of a block."""
    kind = (names.config.get("text_config") or names.config).get("model_type")
    if kind not in _CONTAINERS:
        raise LorakitError(
            f"convert: {module} has experts, and where mlx-lm has them is known for these types of models: "
            f"{', '.join(_CONTAINERS)}; the base is {f'of type {kind!r}' if kind else 'not named: pass --base'}. Else merge "
            "the adapter into its base (lorakit merge)."
        )
    return _CONTAINERS[kind]


def _key(path: str, layer: Layer, names: Names) -> str:
    """How the configuration selects a layer."""
    if found := _BLOCK.fullmatch(path):
        return found[1]
    if path == HEAD:
        return path
    if path == EMBEDDING and isinstance(layer.method, DoRA):
        raise LorakitError(
            f"convert: {path}: MLX keeps a magnitude per token of an embedding, and DoRA here one per feature."
        )
    if path == EMBEDDING and names.config.get("tie_word_embeddings") is False:
        return path
    if path == EMBEDDING:
        raise LorakitError(
            f"convert: {path} also changes the head in MLX where the two are tied; a base (--base) that says "
            "tie_word_embeddings=false is needed."
        )
    raise LorakitError(
        f"convert: {path} is no layer by mlx-lm's names, which are those of Llama and similar models: model.layers.N.…, {HEAD}."
    )


MLX = Format(
    name="mlx",
    title="MLX (mlx-lm)",
    file="folder: adapter_config.json, adapters.safetensors",
    suffix="",
    holds=("lora", "dora"),
    kinds=(LINEAR, "embedding", EXPERT),
    about="one",
    scale="`lora_parameters`: one scale, which multiplies as it is, and one rank",
    limits="Language models whose layers are model.layers.N.… (Llama, Mistral, Qwen, Gemma, Phi and similar models). Scales "
    "that differ "
    "are multiplied into B, smaller ranks filled up with zeros. Experts need the base's configuration and are written for "
    + ", ".join(_CONTAINERS)
    + ".",
    claims=claims,
    read=read,
    write=write,
    save=write_mlx,
)
