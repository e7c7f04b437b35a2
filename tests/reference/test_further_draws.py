"""Files of PEFT's further types with options drawn at random: read here with PEFT's logits, written here and read there.

`LORAKIT_DRAWS=200` draws more of each type; a failure says its seed, and `LORAKIT_SEED` starts from another one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorakit as lk
from methods.both_ways import trained_by_peft
from reference.models import MODELS, assert_same, logits, quiet, twin

DRAWS, SEED = int(os.environ.get("LORAKIT_DRAWS", "4")), int(os.environ.get("LORAKIT_SEED", "0"))
LAYERS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
}
LINEAR, ALL = ("llama", "bert"), ("llama", "bert", "gpt2")
"""Where PEFT has a type: linear layers alone, or transformers' Conv1D too. All sides here are multiples of 4."""

Draw = Callable[[random.Random], dict[str, Any]]


def _miss(r: random.Random) -> dict[str, Any]:
    kind = r.choice([True, "mini", "bat"])
    return {
        "init_weights": kind,
        "r": r.choice([2, 4]) if kind == "bat" else r.randint(1, 12),
        "mini_r": r.choice([1, 2, 4]),
    }


def _gralora(r: random.Random) -> dict[str, Any]:
    k = r.choice([1, 2, 4])
    return {"gralora_k": k, "r": k * r.randint(1, 3), "hybrid_r": r.choice([0, 0, 2]), "alpha": r.choice([8, 16, 64])}


def _psoft(r: random.Random) -> dict[str, Any]:
    # in powers of two: PEFT rounds alpha / r to float32
    options = {
        "r": r.choice([2, 4, 8]),
        "psoft_alpha": r.choice([4, 32]),
        "ab_svd_init": r.choice(["psoft_init", "pissa_init"]),
    }
    flags = {name: r.random() < 0.7 for name in ("psoft_orth", "psoft_mag_a", "psoft_mag_b")}
    if flags["psoft_orth"] and r.random() < 0.5:
        options |= {"use_cayley_neumann": True, "num_cayley_neumann_terms": r.randint(3, 7)}
    return {**options, **flags, "psoft_svd": r.choice(["full", "lowrank"]), "random_seed": r.randint(0, 9)}


TYPES: dict[str, tuple[type, tuple[str, ...], Draw]] = {
    "miss": (peft.MissConfig, LINEAR, _miss),
    "delora": (peft.DeloraConfig, LINEAR, lambda r: {"r": r.randint(1, 8), "delora_lambda": r.randint(1, 20)}),
    "gralora": (peft.GraloraConfig, ALL, _gralora),
    "hra": (peft.HRAConfig, LINEAR, lambda r: {"r": r.randint(1, 8), "apply_GS": r.random() < 0.3}),
    "road": (
        peft.RoadConfig,
        LINEAR,
        lambda r: {"variant": r.choice(["road_1", "road_2", "road_4"]), "group_size": r.choice([2, 4])},
    ),
    "supertuning": (
        peft.SupertuningConfig,
        LINEAR,
        lambda r: (
            {"sparsity": r.choice([0.5, 0.9, 0.95]), "select_top": r.random() < 0.5, "r": r.choice([None, 2, 4])}
            | {"save_precomputed_indices": r.random() < 0.7}
        ),
    ),
    "pvera": (
        peft.PveraConfig,
        ALL,
        lambda r: {"r": r.randint(1, 30), "projection_prng_key": r.randint(0, 99), "save_projection": r.random() < 0.5},
    ),
    "waveft": (
        peft.WaveFTConfig,
        ALL,
        lambda r: (
            {"n_frequency": r.randint(1, 90), "scaling": r.choice([5.0, 25.0]), "random_loc_seed": r.randint(0, 99)}
            | {"wavelet_family": r.choice(["db1", "db2", "db4", "db7", "db10"]), "use_idwt": r.random() < 0.8}
            | {"proportional_parameters": r.random() < 0.3}
        ),
    ),
    "osf": (peft.OSFConfig, LINEAR, lambda r: {"effective_rank": r.choice([None, 1, 3, 0.25, 0.6])}),
    "psoft": (peft.PsoftConfig, ("llama",), _psoft),
    "peanut": (
        peft.PeanutConfig,
        LINEAR,
        lambda r: (
            {"r": r.randint(1, 8), "depth": r.randint(0, 3), "scaling": r.choice([0.5, 1.0, 2.0])}
            | {"act_fn": r.choice(["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"])}
        ),
    ),
    "deft": (
        peft.DeftConfig,
        ("llama", "gpt2"),
        lambda r: (
            {"r": r.randint(1, 8), "decomposition_method": r.choice(["relu", "qr"]), "para": r.random() < 0.2}
            | {"alpha": r.choice([None, 4, 16])}
        ),
    ),
    "tinylora": (
        peft.TinyLoraConfig,
        ALL,
        lambda r: (
            {"r": r.randint(1, 4), "u": r.randint(1, 20), "weight_tying": r.choice([0.0, 0.3, 0.7, 1.0])}
            | {"projection_seed": r.randint(0, 99), "save_projection": r.random() < 0.5}
        ),
    ),
    "unilora": (
        peft.UniLoraConfig,
        ALL,
        lambda r: (
            {"r": r.randint(1, 8), "theta_d_length": r.randint(5, 300), "proj_seed": r.randint(0, 99)}
            | {"save_indices": r.random() < 0.5}
        ),
    ),
    "glora": (
        peft.GloraConfig,
        LINEAR,
        lambda r: (
            {"r": r.randint(1, 8), "config_A_B": r.choice(["lora", "vector", "constant"])}
            | {"config_C": r.choice(["lora", "vector", "none"]), "config_D_E": r.choice(["vector", "constant", "none"])}
        ),
    ),
    "beft": (peft.BeftConfig, ("bert",), lambda r: {}),  # the one with biases
    "ln-tuning": (peft.LNTuningConfig, ALL, lambda r: {}),
}
IN_FLOATS = ("psoft", "deft")
"""What PEFT has in float32 alone."""
NORMS = {"llama": ["input_layernorm", "model.norm"], "bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("number", range(DRAWS))
def test_both_ways(name: str, number: int, tmp_path: Path) -> None:
    seed = SEED + number
    r = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    kind, kinds, draw = TYPES[name]
    model = r.choice(kinds)
    wanted = NORMS[model] if name == "ln-tuning" else LAYERS[model]
    options = {**draw(r), "target_modules": [*r.sample(wanted[:-1], r.randint(0, len(wanted) - 1)), wanted[-1]]}
    known = kind.__dataclass_fields__
    if "layers_to_transform" in known and r.random() < 0.4:
        options["layers_to_transform"] = r.sample([0, 1], r.randint(1, 2))
    if "fan_in_fan_out" in known:
        options["fan_in_fan_out"] = model == "gpt2"
    if model == "llama" and r.random() < 0.3:
        options["modules_to_save"] = ["lm_head"]
    floats = name in IN_FLOATS
    dtype, size = (torch.float32, 0.1) if floats else (torch.float64, 0.2)

    def same(a: Any, b: Any) -> None:
        if floats:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert_same(a, b)

    base = MODELS[model]().to(dtype)
    print(f"{name}, seed {seed}: {model}, {options}")
    theirs = trained_by_peft(twin(base), kind(**options), size)
    with quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = logits(theirs, model)
    assert (expected - logits(base, model)).abs().max() > (1e-4 if floats else 1e-9), "nothing changed"
    read = twin(base)
    adapter = lk.load(read, tmp_path / "theirs", name="a")
    same(logits(read, model), expected)
    adapter.save(tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(twin(base), str(tmp_path / "ours")).eval()
    same(logits(again, model), expected)
    lk.merge(read, "a")
    same(logits(read, model), expected)
