"""The layers that PEFT adapts where none are named, by the model_type of the model's configuration."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorakit.core.walking import has_suffix, walk
from lorakit.errors import LorakitError
from lorakit.models.renaming import Renaming

_QUERY_VALUE = {
    (
        "q_proj",
        "v_proj",
    ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("q", "v"): "t5 mt5",
    ("query_key_value",): "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("Wqkv",): "mpt",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
}
DEFAULT_TARGETS = {kind: list(names) for names, kinds in _QUERY_VALUE.items() for kind in kinds.split()}
"""config.model_type -> the layers that are adapted where target_modules is not given."""

_ALL_OF_SOME = {
    "t5": "q k v o wi wo",
    "mt5": "q k v o wi_0 wi_1 wo",
    "bart": "q_proj k_proj v_proj out_proj fc1 fc2",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "deberta-v2": "query_proj key_proj value_proj dense",
}
_SQUARE = {"gpt2": "mlp.c_proj", "gpt_bigcode": "mlp.c_proj"}
_PHI = {"phi": "q_proj v_proj"}
_ALL = "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj"
_OTHERS = {
    "ADALORA": {**_ALL_OF_SOME, "roberta": "query key value dense"},
    "VBLORA": _ALL_OF_SOME,
    "C3A": _SQUARE,
    "FOURIERFT": _SQUARE,
    "WAVEFT": _SQUARE,
    "PVERA": {**_PHI, "dinov2": "query value"},
    "OSF": {
        **dict.fromkeys("llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi".split(), _ALL),  # noqa: SIM905
        **dict.fromkeys(_SQUARE, "c_attn c_proj"),
        **dict.fromkeys(("bloom", "gpt_neox", "falcon"), "query_key_value dense_4h_to_h"),
        "opt": _ALL_OF_SOME["opt"],
        "gptj": "q_proj k_proj v_proj out_proj fc_in fc_out",
    },
    # PEFT trains the biases of values alone
    "BEFT": {kind: value for kind, names in DEFAULT_TARGETS.items() for value in names if value.startswith("v")},
    "SHIRA": _PHI,
    "VERA": _PHI,
}
_LN = {
    "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": "gemma2 gemma3_text",
    "post_attention_layernorm": "qwen2 qwen3",
    "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
    "layer_norm final_layer_norm": "t5 mt5",
    "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
    "ln_1 ln_2 ln_f": "gpt2",
    "ln_1 ln_f": "gptj",
    "input_layernorm final_layernorm": "phi",
    "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
    "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
}
"""LN-tuning's modules, and the architectures."""
_IA3 = {
    ("k", "v", "wo"): ("wo", "t5"),
    ("k", "v", "wi_1"): ("", "mt5"),
    ("c_attn", "mlp.c_proj"): ("mlp.c_proj", "gpt2 gpt_bigcode"),
    ("query_key_value", "mlp.dense_4h_to_h"): ("mlp.dense_4h_to_h", "bloom"),
    ("query_key_value", "dense_4h_to_h"): ("dense_4h_to_h", "gpt_neox RefinedWeb RefinedWebModel falcon"),
    ("key", "value", "output.dense"): ("output.dense", "bert roberta"),
    ("key_proj", "value_proj", "output.dense"): ("output.dense", "deberta-v2"),
    ("in_proj", "output.dense"): ("output.dense", "deberta"),
    ("q_proj", "k_proj", "fc2"): ("fc2", "opt"),
    ("q_proj", "v_proj", "fc2"): ("fc2", "bart phi"),
    ("q_proj", "v_proj", "fc_out"): ("fc_out", "gptj"),
    ("q_proj", "v_proj", "c_proj"): ("c_proj", "gpt_neo"),
    ("k_proj", "v_proj", "down_proj"): ("down_proj", "llama mistral"),
    ("k_proj", "v_proj", "w2"): ("w2", "mixtral"),
    ("q_proj", "v_proj", "down_proj"): ("down_proj", "llama4 gemma gemma2 gemma3_text qwen2 qwen3"),
}
"""IA3's layers -> those of them that scale their input, and the architectures."""


def default_targets(method: str, kind: str | None) -> list[str]:
    """The layers that PEFT's method adapts in a model of this model_type. LorakitError where PEFT has no default."""
    if method == "IA3":
        own = {one: list(names) for names, (_, kinds) in _IA3.items() for one in kinds.split()}
    elif method == "LN_TUNING":
        own = {one: names.split() for names, kinds in _LN.items() for one in kinds.split()}
    else:
        own = {**DEFAULT_TARGETS, **{one: names.split() for one, names in _OTHERS.get(method, {}).items()}}
    if kind not in own:
        raise LorakitError(
            f"get_peft_model: target_modules was not given, and there is no default for model_type {kind!r}; "
            '"all-linear" or a list of layer names would work.'
        )
    return own[str(kind)]


def todays_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of layers with those that transformers has renamed as the model has them now: ViT's `query` is `q_proj`."""
    paths = [path for path, _ in walk(model)]
    lost = {name for name in names if not any(has_suffix(path, name) for path in paths)}
    moved: dict[str, str] = {}
    for entry in Renaming(model, ()).renamings if lost else ():
        for source, target in zip(entry.source_patterns, entry.target_patterns, strict=False):
            old, new = source.replace("\\", "").strip("^$."), target.strip(".")
            moved |= {
                name: new for name in lost if has_suffix(old, name) and any(has_suffix(path, new) for path in paths)
            }
    return list(dict.fromkeys(moved.get(name, name) for name in names))


def feedforward_targets(kind: str | None) -> list[str]:
    """The layers of IA3's default that scale their input."""
    return [inner for inner, kinds in _IA3.values() if kind in kinds.split() and inner]
