"""The files of weight methods that PEFT has too, or that lorakit's own rule of names does not describe."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch

from lorakit.core.layout import Convolution
from lorakit.errors import LorakitError
from lorakit.files.formats.format import Config, Format, Tensors
from lorakit.methods import LoRA
from lorakit.methods.peanut import DEEPEST

# -- LoRA and its kin --------------------------------------------------------------------------------------------------------

log = logging.getLogger("lorakit")

_REFUSED = {
    "arrow_config": "it is a router over other adapters",
    "kasa_config": "its base is truncated",
    "velora_config": "VeLoRA is another method",
    "monteclora_config": "MonteCLoRA is another method",
    "megatron_config": "it adapts Megatron's parallel layers",
}
_SHIFTING = ("pissa", "olora", "corda", "lora_ga", "loftq")


def _of_the_original_base(config: Config) -> dict[str, Any]:
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.partition("_niter")[0] in _SHIFTING:
        raise LorakitError(
            f"load: the configuration says init_lora_weights={start!r}, so the tensors belong to a base whose weights "
            "that start has changed, not to the original. In PEFT, save it with path_initial_model_for_weight_conversion "
            "to get a plain LoRA for the original base."
        )
    return {}


_LORA = Format(
    "LORA",
    {"A": "lora_A.weight:in", "B": "lora_B.weight:out", "b": "lora_B.bias"},
    {"embedding": {"A": "lora_embedding_A:in", "B": "lora_embedding_B:out"}},
    fixed={"use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True},
    ignored=frozenset(
        {"eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core"}
        | {
            "use_qalora",
            "qalora_group_size",
            "merge_weights",
        }  # the first PEFT's: whether to merge while it is not trained
    ),
    refused=_REFUSED,
    read=_of_the_original_base,
)


def _blocks(config: Config) -> dict[str, Any]:
    given = config["use_bdlora"]
    return _of_the_original_base(config) | {
        "blocks": given.get("nblocks", 1),
        "a_modules": given.get("target_modules_bd_a") or (),
        "b_modules": given.get("target_modules_bd_b") or (),
        "strict": given.get("match_strict", True),
    }


def _in_blocks(spec: Any) -> dict[str, Any]:
    own = {"target_modules_bd_a": list(spec.a_modules), "target_modules_bd_b": list(spec.b_modules)}
    return {"use_bdlora": {**own, "nblocks": spec.blocks, "match_strict": spec.strict}}


def _in_blocks_of_linear_layers(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT has blocks in linear layers, and by their names alone; any other file is lorakit's own."""
    theirs = all(site.layout.kind in ("linear", "transposed") for _, site, _ in adapter.deltas())
    return {} if theirs and not adapter.method.side else {"peft_type": "BD-LORA"}


def _dora(spec: Any) -> dict[str, Any]:
    # PEFT has no DoRA over another method than LoRA; the file is lorakit's own then and says so.
    return {"use_dora": True} if isinstance(spec.inner, LoRA) else {"peft_type": "DORA"}


# -- AdaLoRA: PEFT's scale is lora_alpha / (init_r + 1e-5) --------------------------------------------------------------------

_EPSILON = 1e-5


def adalora_scale(config: Config, start: int = 12) -> float:
    """The scale s of a file of AdaLoRA; `start` is the rank that it began with, where its configuration does not say."""
    start, alpha = int(config.get("init_r", start)), float(config.get("lora_alpha", 8))
    return float((alpha if alpha > 0 else start) / (start + _EPSILON))


def _triplets(spec: Any) -> dict[str, Any]:
    counts = [value if isinstance(value, int) else 0 for value in (spec.warmup, spec.final)]
    return {
        "target_r": min(spec.final_rank, spec.rank),
        "lora_alpha": spec.scale * (spec.rank + _EPSILON),
        "total_step": sum(counts) + 1,  # how long the run was is not known; PEFT wants a number above these
    }


def _triplets_of_all(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT starts all layers at one rank with one scale and says by booleans which triplets are left."""
    if not specs:
        return {}
    scales = [spec.scale for spec in specs.values()]
    if max(scales) - min(scales) > 1e-12 * abs(max(scales)):
        # PEFT has one scale for all; the file is lorakit's own
        return {"peft_type": f"{adapter.method.name.upper()}-SCALES"}
    start = max(spec.rank for spec in specs.values())
    kept = {f"{path}.lora_E": [index < spec.rank for index in range(start)] for path, spec in specs.items()}
    return {
        "init_r": start,
        "target_r": min(adapter.method.final_rank, start),
        "lora_alpha": scales[0] * (start + _EPSILON),
        "rank_pattern": kept if any(spec.rank != start for spec in specs.values()) else None,
        "alpha_pattern": {},
    }


def _triplets_kept(config: Config) -> dict[str, Any]:
    if config.get("peft_type") != "ADALORA":
        return {}  # lorakit's own: plain ranks
    kept = config.get("rank_pattern") or {}
    ranks = {f"^{re.escape(key.rpartition('.')[0])}": max(1, sum(map(bool, flags))) for key, flags in kept.items()}
    scale = adalora_scale(config)
    return {"rank_pattern": ranks, "alpha_pattern": {path: scale * rank for path, rank in ranks.items()}}


def _one_empty_triplet(spec: Any, tensors: Tensors, *_: Any) -> Tensors:
    """PEFT takes all triplets of a layer away where none was kept; here one with λ = 0 stands for them."""
    result = dict(tensors)
    for key, tensor in tensors.items():
        axis = 1 if key.endswith(".lora_B") else 0
        if key.endswith((".lora_A", ".lora_B", ".lora_E")) and not tensor.shape[axis]:
            result[key] = tensor.new_zeros(tensor.shape[0], 1) if axis else tensor.new_zeros(1, *tensor.shape[1:])
    return result


_ADALORA = Format(
    "ADALORA",
    {"Q": "lora_A", "P": "lora_B", "lam": "lora_E:column"},
    fixed={**_LORA.fixed, "use_rslora": False, "r": 8},  # PEFT does not use r, and warns of any other value
    ignored=_LORA.ignored | {"lora_bias", "use_bdlora"},  # which its layers do not read
    refused=_REFUSED | {"alora_invocation_tokens": "AdaLoRA acts on all tokens, in PEFT too"},
    read=lambda config: _of_the_original_base(config) | {"alpha": adalora_scale(config) * config.get("init_r", 12)},
    write=_triplets,
    whole=_triplets_of_all,
    patterns=_triplets_kept,
    from_file=_one_empty_triplet,
)

# -- shared tensors ----------------------------------------------------------------------------------------------------------

_LOST, _NEVER = -1e3, -1e4
"""Logits of a selected piece whose weight was stored as 0, and of pieces that were not selected: both give 0 in float64."""


def _logits_of_selections(spec: Any, tensors: Tensors, *_: Any) -> Tensors:
    """Selections become logits: the logarithms of the stored weights, and for all others a value that never wins."""
    ending = "_topk_indices"
    result = dict(tensors)
    for key in [key for key in tensors if key.endswith(ending)]:
        name = key.removesuffix(ending)
        indices, weights = result.pop(key).long(), result.pop(f"{name}_topk_weights", None)
        if weights is None or weights.shape[-1] + 1 != indices.shape[-1]:
            raise LorakitError(
                f"load: {key} needs {name}_topk_weights with one weight less than indices, since they sum to 1."
            )
        if indices.min() < 0 or indices.max() >= spec.num_vectors:
            raise LorakitError(
                f"load: {key} selects vector {int(indices.max())}; the bank has {spec.num_vectors} vectors."
            )
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        logits = weights.new_full((*indices.shape[:-1], spec.num_vectors), _NEVER)
        result[name] = logits.scatter(-1, indices, weights.clamp_min(0).log().clamp_min(_LOST))
    return result


def _bases_once(spec: Any, tensors: Tensors, *_: Any) -> Tensors:
    """The bases once: PEFT repeats them under every layer."""
    result = dict(tensors)
    for key in tensors:
        path, name = key.rpartition(".")[::2]
        if not path or name not in ("randlora_A", "randlora_B"):
            continue
        copy, shared = result.pop(key), result.get(name)
        if shared is None:
            result[name] = copy
        elif copy.shape != shared.shape or not torch.equal(copy, shared):
            raise LorakitError(
                f"load: {key} is another basis than the file's other {name}; one adapter has one pair of bases."
            )
    return result


def _basis(config: Config) -> dict[str, Any]:
    return {"basis": "very_sparse" if config.get("very_sparse") else "sparse" if config.get("sparse") else "dense"}


# -- the others --------------------------------------------------------------------------------------------------------------


_DROPOUTS = frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale"})


_SINCE = (0, 18)
"""The version of PEFT from which its files hold OFT's series in this form."""


def _rotations(config: Config) -> dict[str, Any]:
    if "oft_block_size" not in config:
        raise LorakitError(
            "load: the configuration has no oft_block_size: before PEFT 0.14, OFT's files held whole blocks that acted "
            "on the other side. PEFT cannot read them either."
        )
    if not config.get("use_cayley_neumann", False):
        return {}
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version", "")))
    if version is None or tuple(map(int, version.groups())) < _SINCE:
        raise LorakitError(
            f"load: the configuration is of PEFT {config.get('peft_version') or 'before 0.18'} with use_cayley_neumann, "
            "whose series was another then; PEFT 0.17 can merge it."
        )
    terms = config.get("num_cayley_neumann_terms", 5)
    if terms < 3:  # PEFT's third and fourth give the same series
        raise LorakitError(f"load: num_cayley_neumann_terms={terms} is no rotation; at least 3 are needed.")
    return {}


def _one_rank(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing, and a warning where ranks differ: PEFT 0.21 has HiRA's rank_pattern, and builds every layer with `r`."""
    if len({spec.rank for spec in specs.values()}) > 1:
        log.warning(
            "save: the layers of this HiRA adapter have different ranks, which PEFT 0.21 writes down and then builds alike, so "
            "that it cannot read the file; lorakit can. With one rank for all layers PEFT can too."
        )
    return {}


OTHER_AXES = "LOKR_CONV1D"
"""What a file calls itself where PEFT would read another function of it: LoKr with a whole D on a Conv1d."""


def _on_other_axes(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    found = (
        isinstance(site.layout, Convolution) and len(site.layout.window) == 2 and hasattr(delta, "D")
        for _, site, delta in adapter.deltas()
    )
    return {"peft_type": OTHER_AXES} if any(found) else {}


def check_axes(config: Config, tensors: Tensors) -> None:
    """Refuse a file of PEFT's whose LoKr multiplies a matrix with an array of three axes: C meets the wrong ones there."""
    key = next((key for key, one in tensors.items() if key.endswith(".lokr_w2") and one.ndim == 3), None)
    if key is not None and config.get("peft_type") == "LOKR":
        raise LorakitError(
            f"load: {key} is of a Conv1d, on which PEFT's LoKr with a whole w2 is no Kronecker product (its w1 meets the "
            "kernel's axes), so that no LoKr is what its author saw. PEFT can merge it into its base."
        )


def _feedforward(spec: Any) -> dict[str, Any]:
    given = spec.feedforward_modules or ()
    if not isinstance(given, str) and given:
        # As an expression: a list would have to repeat entries of target_modules, which are written as resolved.
        given = rf"(.*\.)?({'|'.join(re.escape(ending) for ending in given)})"
    return {"feedforward_modules": given if isinstance(given, str) else []}


def _places(config: Config) -> dict[str, Any]:
    if config.get("random_loc_seed", 777) is None:
        raise LorakitError(
            "load: the configuration has random_loc_seed=null, and the places of the frequencies are in no file."
        )
    return {}


def _frozen_triplets(adapter: Any, specs: Mapping[str, Any]) -> dict[str, Any]:
    """How many triplets each layer keeps frozen, by its whole name: PEFT searches for a pattern anywhere in a name."""
    kept = {
        f"^{re.escape(site.place(path))}$": min(delta.shape.out, delta.shape.in_) - len(delta.S)
        for path, site, delta in adapter.deltas()
    }
    return {"effective_rank": None, "rank_pattern": kept}


def _without_zeros(spec: Any, tensors: Tensors, *_: Any) -> Tensors:
    """PEFT writes zeros for what is none."""
    return {key: tensor for key, tensor in tensors.items() if not re.search(r"\.glora_[A-E]\.zeros$", key)}


UNSUPPORTED = {
    "LILY": "its experts are weighed by the mean over all tokens of a batch, so that what a row gets depends on the rows "
    "beside it and no weight, merged or served, is the same function",
    "ADAMSS": "its file lacks which rows of the weight each factor belongs to, which PEFT clusters anew, by scikit-learn, at "
    "each load",
    "FROD": "it keeps a whole matrix of in × in for every kind of layer, more than the weights themselves in most models, and "
    "half of its factors is in no file",
    "SHADOW": "it is a second network with a state of its own beside the blocks of a decoder, and no change of a layer",
    "POLY": "each call must be told the task of every row (task_ids), for a router that draws at random in training",
}
"""PEFT's types that lorakit does not have -> why."""

METHODS: dict[str, Format] = {
    "dora": Format(
        "LORA",
        {"m": "lora_magnitude_vector:features"},
        ignored=_LORA.ignored,
        claims=lambda config: bool(config.get("use_dora")),
        write=_dora,
    ),
    "bd-lora": dataclasses.replace(
        _LORA,
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        kinds={},
        fixed={**_LORA.fixed, "lora_bias": False},
        claims=lambda config: bool(config.get("use_bdlora")),
        read=_blocks,
        write=_in_blocks,
        whole=_in_blocks_of_linear_layers,
    ),
    "alora": dataclasses.replace(
        _LORA,
        fixed={**_LORA.fixed, "lora_bias": False},
        claims=lambda config: bool(config.get("alora_invocation_tokens")),
    ),
    "lora": _LORA,
    "lora-fa": _LORA,
    "dylora": _LORA,
    "relora": _LORA,
    "adalora": _ADALORA,
    "elalora": _ADALORA,
    "vera": Format("VERA"),
    "vb-lora": Format("VBLORA", from_file=_logits_of_selections),
    "randlora": Format(
        "RANDLORA",
        {"lambda_": "randlora_lambda", "gamma": "randlora_gamma"},
        read=_basis,
        write=lambda spec: {"sparse": spec.basis == "sparse", "very_sparse": spec.basis == "very_sparse"},
        from_file=_bases_once,
    ),
    "fourierft": Format("FOURIERFT", {"c": "fourierft_spectrum"}, read=_places),
    # The file's own indices count; PEFT's mask_type only says how a new adapter gets them, and knows "random" alone.
    "shira": Format("SHIRA", {"values": "shira_weight", "indices": "shira_indices"}, fixed={"mask_type": "random"}),
    "c3a": Format("C3A", {"k": "c3a_kernel"}),
    "loha": Format(
        "LOHA",
        {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
        | {"T1": "hada_t1:kernel", "U1": "hada_w1_a", "V1": "hada_w1_b"}  # of convolutions with tucker
        | {"T2": "hada_t2:kernel", "U2": "hada_w2_a", "V2": "hada_w2_b"},
        ignored=_DROPOUTS,
    ),
    "lokr": Format(
        "LOKR",
        {"C": "lokr_w1", "C_a": "lokr_w1_a", "C_b": "lokr_w1_b", "D": "lokr_w2:taps", "D_a": "lokr_w2_a", "D_b": "lokr_w2_b"}
        | {"D_t": "lokr_t2:kernel", "D_u": "lokr_w2_a", "D_v": "lokr_w2_b"},  # of convolutions with tucker
        ignored=_DROPOUTS,
        whole=_on_other_axes,
    ),
    "oft": Format(
        "OFT",
        {"Q": "oft_R.weight"},
        {"embedding": {"Q": "oft_embedding_R.weight"}},
        fixed={"peft_version": ".".join(map(str, _SINCE)) + ".0"},
        read=_rotations,
    ),
    "boft": Format("BOFT", {"M": "boft_R", "s": "boft_s:column"}, {"convolution": {"M": "boft_R", "s": "boft_s:row"}}),
    "hira": Format(
        "HIRA",
        {"A": "hira_A:in", "B": "hira_B:out"},
        {"embedding": {"A": "hira_embedding_A:in", "B": "hira_embedding_B:out"}},
        ignored=frozenset({"hira_dropout"}),
        whole=_one_rank,
    ),
    "ia3": Format(
        "IA3",
        {"l": "ia3_l:column"},
        {"convolution": {"l": "ia3_l:features"}},
        ignored=frozenset({"init_ia3_weights"}),
        write=_feedforward,
    ),
    "trainable-tokens": Format("TRAINABLE_TOKENS", {"R": "trainable_tokens_delta"}, ignored=frozenset({"init_weights"})),
    "miss": Format("MISS", {"D": "miss_block"}),
    "delora": Format("DELORA", {"A": "delora_A", "B": "delora_B", "lam": "delora_lambda", "w": "delora_w_norm"}),
    "gralora": Format(
        "GRALORA",
        {"A": "gralora_A", "B": "gralora_B", "whole_A": "gralora_A_general.weight", "whole_B": "gralora_B_general.weight"},
    ),
    "hra": Format("HRA"),
    "road": Format("ROAD"),
    "supertuning": Format(
        "SUPERTUNING",
        {"values": "supertuning_values", "indices": "supertuning_indices", "A": "supertuning_lora_A.weight:in",
         "B": "supertuning_lora_B.weight:out"},
    ),
    "pvera": Format(
        "PVERA",
        ignored=frozenset({"generator_seed"}),
        refused={"sample_at_inference": "its outputs are drawn again at each call, and no weight gives them"},
    ),
    "waveft": Format(
        "WAVEFT", {"c": "waveft_spectrum"}, ignored=frozenset({"proportional_parameters"}), read=_places
    ),
    "osf": Format(
        "OSF",
        {"U": "osf_svd_params.U_low", "S": "osf_svd_params.S_low", "V": "osf_svd_params.V_low"},
        ignored=frozenset({"target_svd_config"}),
        whole=_frozen_triplets,
    ),
    "psoft": Format("PSOFT", {"Q": "psoft_R.weight", "a": "psoft_R.vector_a", "b": "psoft_R.vector_b"}),
    "peanut": Format(
        "PEANUT",
        {
            "A": "peanut_A.weight",
            "B": "peanut_B.weight",
            **{f"E{number}": f"peanut_encoders.{number}.weight" for number in range(DEEPEST)},
            **{f"D{number}": f"peanut_decoders.{number}.weight" for number in range(DEEPEST)},
        },
    ),
    "deft": Format("DEFT", ignored=frozenset({"init_scale"})),
    "tinylora": Format("TINYLORA"),
    "unilora": Format("UNILORA", apart=False),
    "glora": Format(
        "GLORA",
        {letter: f"glora_{letter}.X" for letter in "ABCDE"}
        | {f"{letter}_{side}": f"glora_{letter}.X{side}" for letter in "ABC" for side in "du"},
        from_file=_without_zeros,
    ),
    "ln-tuning": Format(
        "LN_TUNING",
        replaced="ln_tuning_layers.",
        from_file=lambda spec, tensors, *_: {key.replace(".ln_tuning_layers.", "."): one for key, one in tensors.items()},
    ),
    "bitfit": Format("BEFT", {"c": "beft_bias:row"}),
    "1lora": Format(tensors={"v": "onelora_v"}),
    "tied-lora": Format(tensors={"u": "tied_u", "v": "tied_v"}),
}  # fmt: skip
