"""The files of methods that PEFT has, both ways: the same logits, names and shapes. What a file says beyond that, and where
PEFT is wrong, stands in the tests of each method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import lorakit as lk
from lorakit.core.delta import Method
from methods.both_ways import both_ways
from methods.peft_files import TARGETS, from_peft, to_peft

CONVOLUTIONS = ["one", "two", "point", "head"]
QV = ["q_proj", "v_proj"]
QD = ["q_proj", "down_proj"]

# fmt: off
CASES: list[tuple[str, type, dict[str, Any], Method]] = [
    ("llama", peft.BOFTConfig, {"target_modules": QD, "boft_block_size": 8}, lk.BOFT(block_size=8, factors=1)),
    ("bert", peft.BOFTConfig, {"target_modules": ["query", "dense"], "boft_block_size": 0, "boft_block_num": 4},
     lk.BOFT(blocks=4, factors=1)),
    ("convolutions", peft.BOFTConfig, {"target_modules": ["point", "head"], "boft_block_size": 3},
     lk.BOFT(block_size=3, factors=1)),
    ("llama", peft.HiraConfig, {"target_modules": QD, "r": 3}, lk.HiRA(rank=3)),
    ("gpt2", peft.HiraConfig, {"target_modules": ["c_attn"], "r": 3, "fan_in_fan_out": True}, lk.HiRA(rank=3)),
    ("words", peft.HiraConfig, {"target_modules": ["words", "body"], "r": 3}, lk.HiRA(rank=3)),
    ("convolutions", peft.HiraConfig, {"target_modules": CONVOLUTIONS, "r": 2}, lk.HiRA(rank=2)),
    ("llama", peft.IA3Config, {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
     lk.IA3(feedforward_modules=["down_proj"])),
    ("bert", peft.IA3Config, {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
     lk.IA3(feedforward_modules=["output.dense"])),
    ("t5", peft.IA3Config, {"target_modules": ["k", "v", "wo"], "feedforward_modules": [], "task_type": "SEQ_2_SEQ_LM"},
     lk.IA3(feedforward_modules=[])),
    ("gpt2", peft.IA3Config, {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"],
     "fan_in_fan_out": True}, lk.IA3(feedforward_modules=["mlp.c_proj"])),
    ("convolutions", peft.IA3Config, {"target_modules": ["two", "three", "point", "head"],
     "feedforward_modules": ["two", "point"]}, lk.IA3(feedforward_modules=["two", "point"])),
    ("words", peft.IA3Config, {"target_modules": ["body"], "feedforward_modules": r"inner\.body"},
     lk.IA3(feedforward_modules=r"inner\.body")),
    # scales that float32 holds exactly: PEFT rounds alpha / rank to it (5/3 differs by 5e-9 then)
    ("llama", peft.LoHaConfig, {"target_modules": QD, "r": 4, "alpha": 5}, lk.LoHa(rank=4, alpha=5)),
    ("llama", peft.LoHaConfig, {"target_modules": QV, "r": 4, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"q_proj": 2}},
     lk.LoHa(rank=4)),
    ("bert", peft.LoHaConfig, {"target_modules": ["query", "dense"], "r": 2}, lk.LoHa(rank=2)),
    ("convolutions", peft.LoHaConfig, {"target_modules": CONVOLUTIONS, "r": 2, "alpha": 3}, lk.LoHa(rank=2, alpha=3)),
    ("llama", peft.LoKrConfig, {"target_modules": QD, "r": 1, "alpha": 5}, lk.LoKr(rank=1, alpha=5)),
    ("llama", peft.LoKrConfig, {"target_modules": ["q_proj", "up_proj"], "r": 1, "decompose_both": True,
     "decompose_factor": 8}, lk.LoKr(rank=1, factor=8, decompose_both=True)),
    ("llama", peft.LoKrConfig, {"target_modules": QV, "r": 6, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 2}},
     lk.LoKr(rank=6)),
    ("convolutions", peft.LoKrConfig, {"target_modules": CONVOLUTIONS, "r": 1, "alpha": 3}, lk.LoKr(rank=1, alpha=3)),
    ("convolutions", peft.LoKrConfig, {"target_modules": ["two", "point"], "r": 4, "alpha": 3}, lk.LoKr(rank=4, alpha=3)),
    ("llama", peft.OFTConfig, {"target_modules": QD, "oft_block_size": 8}, lk.OFT(block_size=8)),
    ("llama", peft.OFTConfig, {"target_modules": QD, "oft_block_size": 8, "use_cayley_neumann": False},
     lk.OFT(block_size=8, exact=True)),
    ("llama", peft.OFTConfig, {"target_modules": QV, "r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 7},
     lk.OFT(blocks=4, terms=7)),
    ("llama", peft.OFTConfig, {"target_modules": ["q_proj"], "oft_block_size": 4, "block_share": True,
     "num_cayley_neumann_terms": 4}, lk.OFT(block_size=4, block_share=True, terms=4)),
    # an eps / √k that float32 holds exactly: PEFT rounds it so
    ("llama", peft.OFTConfig, {"target_modules": QD, "r": 4, "oft_block_size": 0, "coft": True, "eps": 0.375},
     lk.OFT(blocks=4, coft=True, eps=0.375)),
    ("convolutions", peft.OFTConfig, {"target_modules": ["point", "head"], "oft_block_size": 2, "use_cayley_neumann": False},
     lk.OFT(block_size=2, exact=True)),
    ("words", peft.OFTConfig, {"target_modules": ["words", "inner.body"], "r": 1, "oft_block_size": 0}, lk.OFT(blocks=1)),
    ("llama", peft.LNTuningConfig, {"target_modules": ["input_layernorm", "model.norm"]}, lk.LNTuning()),
    ("bert", peft.LNTuningConfig, {"target_modules": ["output.LayerNorm"]}, lk.LNTuning()),
    ("bert", peft.BeftConfig, {"target_modules": ["query", "dense"]}, lk.BitFit()),
    ("llama", peft.MissConfig, {"target_modules": QD, "r": 5}, lk.MiSS(rank=5)),
    ("llama", peft.MissConfig, {"target_modules": QD, "r": 7, "mini_r": 4, "init_weights": "mini"},
     lk.MiSS(rank=7, kind="mini", mini=4)),
    ("bert", peft.MissConfig, {"target_modules": ["query", "dense"], "r": 8, "init_weights": "bat"},
     lk.MiSS(rank=8, kind="bat")),
    ("llama", peft.DeloraConfig, {"target_modules": QV, "r": 3, "rank_pattern": {"v_proj": 5}, "lambda_pattern": {"q_proj": 2}},
     lk.DeLoRA(rank=3)),
    ("bert", peft.GraloraConfig, {"target_modules": ["query", "dense"], "r": 6, "gralora_k": 2, "alpha": 9},
     lk.GraLoRA(rank=6, alpha=9)),
    ("gpt2", peft.GraloraConfig, {"target_modules": ["c_attn"], "r": 4, "gralora_k": 4, "hybrid_r": 4, "alpha": 24,
     "fan_in_fan_out": True}, lk.GraLoRA(rank=4, blocks=4, hybrid=4, alpha=24)),
    ("llama", peft.HRAConfig, {"target_modules": QD, "r": 4}, lk.HRA(rank=4)),
    ("convolutions", peft.HRAConfig, {"target_modules": ["point", "head"], "r": 4}, lk.HRA(rank=4)),
    ("bert", peft.HRAConfig, {"target_modules": ["query", "dense"], "r": 3, "apply_GS": True}, lk.HRA(rank=3, orthogonal=True)),
    ("bert", peft.RoadConfig, {"target_modules": ["query", "dense"], "group_size": 4}, lk.RoAd(group=4)),
    ("bert", peft.RoadConfig, {"target_modules": ["query", "dense"], "group_size": 8, "variant": "road_2"},
     lk.RoAd(group=8, variant="road_2")),
    ("llama", peft.RoadConfig, {"target_modules": QD, "group_size": 12, "variant": "road_4"},
     lk.RoAd(group=12, variant="road_4")),
    ("llama", peft.PveraConfig, {"target_modules": QD, "r": 5, "projection_prng_key": 7}, lk.PVeRA(rank=5, seed=7)),
    ("gpt2", peft.PveraConfig, {"target_modules": ["c_attn", "mlp.c_proj"], "r": 5, "save_projection": False,
     "fan_in_fan_out": True}, lk.PVeRA(rank=5, save_projection=False)),
    ("gpt2", peft.WaveFTConfig, {"target_modules": ["c_attn", "mlp.c_proj"], "n_frequency": 30, "scaling": 20.0,
     "fan_in_fan_out": True}, lk.WaveFT(n_frequency=30, scale=20.0)),
    ("llama", peft.WaveFTConfig, {"target_modules": QV, "n_frequency": 30, "wavelet_family": "db4", "random_loc_seed": 5},
     lk.WaveFT(n_frequency=30, wavelet="db4", seed=5)),
    ("bert", peft.WaveFTConfig, {"target_modules": ["query", "dense"], "n_frequency": 30, "use_idwt": False},
     lk.WaveFT(n_frequency=30, transform=False)),
    ("llama", peft.OSFConfig, {"target_modules": QV, "effective_rank": 5, "rank_pattern": {"v_proj": 0.25}}, lk.OSF(kept=5)),
    ("bert", peft.OSFConfig, {"target_modules": ["query", "dense"]}, lk.OSF()),
    ("llama", peft.PeanutConfig, {"target_modules": QD, "r": 4}, lk.PEANuT(rank=4)),
    ("bert", peft.PeanutConfig, {"target_modules": ["query", "dense"], "r": 4, "depth": 2, "act_fn": "gelu", "scaling": 0.5},
     lk.PEANuT(rank=4, depth=2, activation="gelu", scale=0.5)),
    ("llama", peft.TinyLoraConfig, {"target_modules": QD, "u": 5, "weight_tying": 0.5}, lk.TinyLoRA(count=5, tying=0.5)),
    ("gpt2", peft.TinyLoraConfig, {"target_modules": ["wte", "c_attn"], "r": 3, "u": 4, "save_projection": False,
     "fan_in_fan_out": True}, lk.TinyLoRA(rank=3, count=4, save_projection=False)),
    ("llama", peft.UniLoraConfig, {"target_modules": QD, "r": 3, "theta_d_length": 50}, lk.UniLoRA(rank=3, length=50)),
    ("gpt2", peft.UniLoraConfig, {"target_modules": ["c_attn"], "proj_seed": 6, "save_indices": True, "fan_in_fan_out": True},
     lk.UniLoRA(seed=6, save_indices=True)),
    ("llama", peft.SupertuningConfig, {"target_modules": QD, "sparsity": 0.9}, lk.SuperTuning(sparsity=0.9)),
    ("bert", peft.SupertuningConfig, {"target_modules": ["query", "dense"], "sparsity": 0.95, "select_top": False, "r": 4,
     "lora_alpha": 6.0}, lk.SuperTuning(sparsity=0.95, largest=False, rank=4, alpha=6.0)),
]
SMALL: list[tuple[type, dict[str, Any], Method, Method, tuple[bool, ...]]] = [
    (peft.FourierFTConfig, {"n_frequency": 20, "scaling": 90.0, "random_loc_seed": 5},
     lk.FourierFT(n_frequency=20, scale=90.0, seed=5), lk.FourierFT(n_frequency=20, seed=6), (False, True)),
    (peft.VBLoRAConfig, {"r": 2, "num_vectors": 7, "vector_length": 4}, lk.VBLoRA(rank=2, num_vectors=7, vector_length=4),
     lk.VBLoRA(rank=2, num_vectors=7, vector_length=4), (False, True)),
    # PEFT has C3A and SHiRA for nn.Linear alone; the places of SHiRA's file count on both sides, however they were chosen
    (peft.C3AConfig, {"block_size": 4}, lk.C3A(block_size=4), lk.C3A(block_size=2), (False,)),
    (peft.ShiraConfig, {"r": 2}, lk.SHiRA(rank=2), lk.SHiRA(rank=2), (False,)),
    # PEFT has PSOFT for float32 alone, and computes DEFT in it
    (peft.PsoftConfig, {"r": 4, "psoft_alpha": 6}, lk.PSOFT(rank=4, alpha=6), lk.PSOFT(rank=3, split=True), (False,)),
    (peft.PsoftConfig, {"r": 5, "psoft_mag_a": False, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
     lk.PSOFT(rank=5, scale_in=False, neumann=True, eps=0.5), lk.PSOFT(rank=5, neumann=True, terms=7), (False,)),
    (peft.PsoftConfig, {"r": 3, "psoft_orth": False, "psoft_svd": "lowrank", "random_seed": 3},
     lk.PSOFT(rank=3, orthogonal=False, svd="lowrank", seed=3), lk.PSOFT(rank=3, scale_out=False), (False,)),
    (peft.DeftConfig, {"r": 3}, lk.DEFT(rank=3), lk.DEFT(rank=3, decomposition="qr", alpha=6.0), (False, True)),
    (peft.DeftConfig, {"r": 3, "para": True}, lk.DEFT(rank=3, para=True), lk.DEFT(rank=3, para=True), (False,)),
    (peft.ShiraConfig, {"r": 2}, lk.SHiRA(rank=2), lk.SHiRA(rank=2, mask="magnitude"), (False,)),
]
# fmt: on


@pytest.mark.parametrize(("model", "config", "options", "spec"), CASES, ids=[f"{c[3].name}-{c[0]}" for c in CASES])
def test_both_ways(model: str, config: Any, options: dict[str, Any], spec: Method, tmp_path: Path) -> None:
    patterns = {name: options[name] for name in ("rank_pattern", "alpha_pattern") if name in options}
    if isinstance(spec, lk.OSF):
        patterns = {"patterns": {"kept": patterns.get("rank_pattern", {})}}
    if "lambda_pattern" in options:
        patterns["patterns"] = {"strength": options["lambda_pattern"]}
    both_ways(model, config(**options), spec, tmp_path, **patterns)


@pytest.mark.parametrize(("config", "options", "read", "written", "layers"), SMALL, ids=[c[2].name for c in SMALL])
def test_both_ways_on_linear_layers(
    config: Any, options: dict[str, Any], read: Method, written: Method, layers: tuple[bool, ...], tmp_path: Path
) -> None:
    for transposed in layers:
        _, adapter = from_peft(config(target_modules=TARGETS, **options), tmp_path / f"theirs-{transposed}", transposed)
        assert adapter.method == read
        assert to_peft(written, tmp_path / f"ours-{transposed}", transposed) == []
