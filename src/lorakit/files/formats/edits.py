"""The files of edits and routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.edits.contract import Anatomy
from lorakit.errors import LorakitError
from lorakit.experts import MEMBERS
from lorakit.experts.xlora import XRouter
from lorakit.files.formats.format import Config, Format, Tensors

PROMPT = "prompt_embeddings"
"""PEFT's name of a prompt, which stands in its files without any prefix."""

_MODEL = frozenset(
    {"num_virtual_tokens", "num_layers", "num_attention_heads", "num_transformer_submodules", "token_dim"}
)


def _model(tokens: int, width: int, heads: int, blocks: Sequence[Any]) -> dict[str, Any]:
    """What PEFT's configuration of a prompt or a prefix says of its model."""
    return {
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": len(blocks),
    }


# -- prompts -----------------------------------------------------------------------------------------------------------------


def _prompted(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    anatomy: Anatomy = adapter.anatomy
    return _model(adapter.method.tokens, anatomy.hidden, anatomy.heads, anatomy.blocks)


def _first_prompt(spec: Any, tensors: Tensors, config: Config, paths: Sequence[str]) -> Tensors:
    """PEFT keeps a second prompt for the decoder of an encoder-decoder and never uses it; the first one is taken."""
    read, count = dict(tensors), int(config["num_virtual_tokens"])
    if "prefix_task_cols" in read:  # the multitask form: P ∘ (columns rows) of its one task
        columns, rows = read.pop("prefix_task_cols"), read.pop("prefix_task_rows")
        read[PROMPT] = read[PROMPT] * (columns[0] @ rows[0])
    if PROMPT in read and read[PROMPT].shape[0] == 2 * count:
        read[PROMPT] = read[PROMPT][:count]
    return read


_OF_TRAINING = frozenset(
    {
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "num_ranks",
    }
    | {"opt_projection_epsilon", "opt_projection_format_epsilon", "num_tasks", "prompt_tuning_init_task"}
    | {"prompt_tuning_init_state_dict_path"}
)
"""Of the types that are read as prompt tuning: how they were trained."""


def _of_one_task(config: Config) -> dict[str, Any]:
    if config.get("num_tasks", 1) != 1:
        raise LorakitError(
            f"load: PEFT type MULTITASK_PROMPT_TUNING with num_tasks={config['num_tasks']} is not supported because each call "
            "must be told the task of every row (task_ids). A file of one task is read as prompt tuning."
        )
    return {"start": "random"}  # how the rows started says nothing of what they are


_STARTS = {"vocabulary": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}


def _started(spec: Any) -> dict[str, Any]:
    # PEFT asks for a tokenizer with a text, though nothing is started anew when a file is read.
    known = spec.start != "text" or (spec.tokenizer is not None and spec.text is not None)
    return {
        "prompt_tuning_init": _STARTS[spec.start] if known else "RANDOM",
        "prompt_tuning_init_text": spec.text if known else None,
        "tokenizer_name_or_path": spec.tokenizer if known else None,
    }


# -- prefixes ----------------------------------------------------------------------------------------------------------------


def _prefixed(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    anatomy: Anatomy = adapter.anatomy
    width = anatomy.key_heads * anatomy.head_size
    entries = _model(adapter.method.tokens, width, anatomy.key_heads, anatomy.key_blocks)
    # PEFT gives decoder layer l the prefix of layer 2l mod L, so that a prefix of its own for each has no place there.
    return entries | ({"peft_type": "PREFIX_TUNING_OF_DECODER"} if anatomy.kind == "encoder-decoder" else {})


def _table(edits: Mapping[Any, Any]) -> dict[tuple[str, str], Tensor]:
    """PEFT's table (tokens, layers · 2 · key heads · head size): keys, then values, of each layer."""
    kept = [edit.kept() for edit in edits.values()]
    return {("", PROMPT): torch.cat([one[side].movedim(1, 0).flatten(1) for one in kept for side in "KV"], dim=1)}


def _layers_of_table(spec: Any, tensors: Tensors, config: Config, paths: Sequence[str]) -> Tensors:
    read = dict(tensors)
    table = read.pop(PROMPT, None)
    if table is None:
        return read
    heads, pieces = int(config["num_attention_heads"]), 2 * len(paths)
    if table.ndim != 2 or table.shape[1] % (pieces * heads):
        raise LorakitError(
            f"load: {PROMPT} has shape {tuple(table.shape)}; for {len(paths)} layers of this model its second size is a "
            f"multiple of {pieces * heads}."
        )
    split = table.view(table.shape[0], pieces, heads, -1).permute(1, 2, 0, 3)
    # For an encoder-decoder PEFT lays its table out twice, for cross-attention too, and uses every second pair of that.
    step = int(config.get("num_transformer_submodules") or 1)
    for number, path in enumerate(paths):
        source = step * number % len(paths)
        read[f"{path}.K"], read[f"{path}.V"] = split[2 * source], split[2 * source + 1]
    return read


# -- LLaMA-Adapter -----------------------------------------------------------------------------------------------------------


_ONE_GATE = ("llama", "mistral")
"""Architectures for which PEFT's variant is ours but for the gate. For GPT-2 it adds after the output projection."""


def _gated(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    spec, anatomy = adapter.method, adapter.anatomy
    places = spec.places(anatomy, None)
    theirs = spec.gate == "layer" and anatomy.model_type in _ONE_GATE
    return {
        "peft_type": "ADAPTION_PROMPT" if theirs else "LLAMA_ADAPTER",
        "adapter_layers": len(places),
        "target_modules": places[0].path.rpartition(".")[2],
    }


def _one_gate(anatomy: Anatomy) -> None:
    if anatomy.model_type not in _ONE_GATE:
        raise LorakitError(
            f"load: PEFT's form of llama-adapter, one gate per layer, is another function for {anatomy.model_type} (for GPT-2 "
            f"it adds after the output projection); it is read for {' and '.join(_ONE_GATE)}."
        )


# -- X-LoRA ------------------------------------------------------------------------------------------------------------------


def _soft_or_top(spec: Any) -> dict[str, Any]:
    own = {"enable_softmax": spec.top_k is None, "enable_softmax_topk": spec.top_k is not None}
    # PEFT divides by the temperature in its dense softmax alone: no type that it knows stands for this
    return own if spec.top_k is None or spec.temperature == 1.0 else {**own, "peft_type": "XLORA_TOPK_TEMPERATURE"}


def _members(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    router: XRouter = adapter.router
    # PEFT numbers the experts, and looks for them under these numbers
    experts = {str(place): f"{MEMBERS}/{name}" for place, name in enumerate(router.members)}
    return {"hidden_size": router.layers[0].in_features, "adapters": experts}


def _no_router(config: Config) -> dict[str, Any]:
    raise LorakitError(
        "load: this X-LoRA has no lorakit.json, as PEFT saves them, and PEFT 0.21 leaves the trained classifier out of its "
        "file, so that there is no router to read. The adapters that it was made of load one by one; "
        "lk.route(model, lk.XLoRA(), [...]) puts a new router over them."
    )


EDITS: dict[str, Format] = {
    "prompt-tuning": Format(
        peft="PROMPT_TUNING",
        tensors={"P": PROMPT},
        ignored=_MODEL | {"tokenizer_kwargs"} | _OF_TRAINING,
        read=_of_one_task,
        write=_started,
        whole=_prompted,
        from_file=_first_prompt,
        also=frozenset({"CPT", "MULTITASK_PROMPT_TUNING"}),
    ),
    "p-tuning": Format(
        peft="P_TUNING",
        tensors={"P": PROMPT},
        fixed={"encoder_dropout": 0.0},
        ignored=_MODEL,
        whole=_prompted,
        from_file=_first_prompt,
    ),
    "prefix-tuning": Format(
        peft="PREFIX_TUNING",
        also=frozenset({"CARTRIDGE"}),
        fixed={"prefix_projection": False},  # what is written has been through the network already
        ignored=_MODEL | {"num_frozen_tokens"},  # which a cartridge does not train
        read=lambda config: {"width": config.get("encoder_hidden_size")},
        write=lambda spec: {"encoder_hidden_size": spec.width},
        whole=_prefixed,
        from_file=_layers_of_table,
        to_file=_table,
    ),
    "llama-adapter": Format(
        peft="ADAPTION_PROMPT",
        tensors={"P": "adaption_prompt:row", "g": "adaption_gate"},
        read=lambda config: {"gate": "layer"},
        whole=_gated,
        check=_one_gate,
    ),
}

ROUTERS: dict[str, Format] = {
    "xlora": Format(
        peft="XLORA",
        fixed={"scaling_pass_value": 0.0, "use_trainable_adapters": False},
        read=_no_router,
        write=_soft_or_top,
        whole=_members,
        router="internal_xlora_classifier.",
    ),
}
