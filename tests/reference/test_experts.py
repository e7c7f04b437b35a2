"""Files of experts: PEFT's stacks both ways, one pair for each expert as transformers 4 had it, and other tools' layouts.

Where PEFT 0.21 would lose a part of a file of ours (it takes shared experts and dense blocks for the experts of transformers
4 and drops them), the layers are named as parameters instead, which it computes in the same way.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from core.test_experts import MODELS, logits, model_of, randomise
from lorakit.errors import LorakitError
from lorakit.files.bundle import CONFIG, OWN, TENSORS


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)


def saved(name: str, folder: Path, method: Any = None, **options: Any) -> Tensor:
    """An adapter of ours in a folder; what its model gives."""
    model = model_of(name)
    adapter = lk.attach(model, method or lk.LoRA(rank=3, alpha=5.0), name="ours", **options)
    randomise(adapter)
    adapter.save(folder)
    return logits(model)


def loaded(name: str, folder: Path) -> Tensor:
    model = model_of(name)
    adapter = lk.load(model, folder, name="loaded")
    with lk.use(model, adapter.name):
        return logits(model)


@pytest.mark.parametrize("name", MODELS)
def test_ours_is_read_by_peft_and_by_us(name: str, tmp_path: Path) -> None:
    expected = saved(name, tmp_path)
    close(loaded(name, tmp_path), expected)
    (tmp_path / OWN).unlink()  # as PEFT's own folder
    close(loaded(name, tmp_path), expected)
    close(logits(peft.PeftModel.from_pretrained(model_of(name), tmp_path).eval()), expected)


@pytest.mark.parametrize(
    "options", [{"r": 3, "lora_alpha": 5}, {"r": 2, "lora_alpha": 3, "use_rslora": True}], ids=["plain", "rs"]
)
@pytest.mark.parametrize("name", MODELS)
def test_peft_is_read_by_us(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = model_of(name)
    stacks = [key for key, parameter in base.named_parameters() if parameter.ndim == 3]
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], target_parameters=stacks, **options)
    if name == "deepseek-v3":
        config.target_modules = {"q_a_proj", "o_proj"}
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    close(loaded(name, tmp_path), logits(theirs))


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_one_parameter_alone(parameter: str, tmp_path: Path) -> None:
    expected = saved("qwen3-moe", tmp_path, target_modules=[f"experts.{parameter}"])
    assert all(".base_layer." not in key for key in load_file(tmp_path / TENSORS))
    (tmp_path / OWN).unlink()
    close(loaded("qwen3-moe", tmp_path), expected)
    close(logits(peft.PeftModel.from_pretrained(model_of("qwen3-moe"), tmp_path).eval()), expected)


def test_ranks_and_scales_that_differ_between_experts(tmp_path: Path) -> None:
    """PEFT has one rank and one scale for a stack: the largest rank, with zeros, and scales in the factors."""
    patterns = {
        "rank_pattern": {r"gate_up_proj\.1": 1, r"down_proj\.2": 4},
        "alpha_pattern": {r"gate_up_proj\.3": 11.0},
    }
    expected = saved("mixtral", tmp_path, **patterns)
    close(loaded("mixtral", tmp_path), expected)
    (tmp_path / OWN).unlink()
    close(loaded("mixtral", tmp_path), expected)
    close(logits(peft.PeftModel.from_pretrained(model_of("mixtral"), tmp_path).eval()), expected)


def test_methods_that_peft_has_no_form_for_are_kept_in_ours(tmp_path: Path) -> None:
    for index, method in enumerate((lk.DoRA(inner=lk.LoRA(rank=2)), lk.LoKr(rank=2), lk.VeRA(rank=4))):
        folder = tmp_path / str(index)
        expected = saved("qwen3-moe", folder, method, target_modules=["experts"])
        close(loaded("qwen3-moe", folder), expected)


# -- other layouts ---------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Any, **entries: Any) -> Path:
    """The same adapter in another layout: `change(module, parameter, A, B)` gives one stack, where A is (experts,
    rank, in) and B (experts, out, rank)."""
    tensors, config = load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())
    result = {key: value for key, value in tensors.items() if ".experts." not in key}
    for key, A in tensors.items():
        if ".experts." in key and key.endswith("lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            parameter = "gate_up_proj" if "base_layer" in key else "down_proj"
            module = key.replace("base_layer.", "").removesuffix(".lora_A.weight")
            result |= change(module, parameter, A.unflatten(0, (4, -1)), B.unflatten(1, (-1, 4)).permute(2, 0, 1))
    other = folder.with_name(f"{folder.name}-other")
    shutil.copytree(folder, other)
    (other / OWN).unlink()
    save_file({key: value.contiguous().clone() for key, value in result.items()}, other / TENSORS)
    (other / CONFIG).write_text(json.dumps({**config, **entries}))
    return other


def each_expert(names: dict[str, str], block: str = "") -> Any:
    def change(module: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        module = module.replace(".mlp.", block or ".mlp.")
        found = {}
        for expert in range(4):
            halves = B[expert].chunk(2) if parameter == "gate_up_proj" else (B[expert],)
            for half, own in zip(halves, ("gate", "up") if len(halves) == 2 else ("down",), strict=True):
                found[f"{module}.{expert}.{names[own]}.lora_A.weight"] = A[expert]
                found[f"{module}.{expert}.{names[own]}.lora_B.weight"] = half
        return found

    return change


V4 = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def test_one_pair_for_each_expert(tmp_path: Path) -> None:
    expected = saved("qwen3-moe", tmp_path / "a")
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", *V4.values()], "target_parameters": None}
    close(loaded("qwen3-moe", rewritten(tmp_path / "a", each_expert(V4), **targets)), expected)


def test_gate_and_up_with_factors_of_their_own(tmp_path: Path) -> None:
    """Two pairs for one stack: a rank of twice the size, at the same scale."""
    expected = saved("qwen3-moe", tmp_path / "a")
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", *V4.values()], "target_parameters": None}
    plain = each_expert(V4)

    def change(module: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        found = plain(module, parameter, A, B)
        return {
            key: tensor.flip(0 if "lora_A" in key else 1) if ".up_proj." in key else tensor
            for key, tensor in found.items()
        }

    close(loaded("qwen3-moe", rewritten(tmp_path / "a", change, **targets)), expected)


def test_mixtral_under_its_names_of_transformers_4(tmp_path: Path) -> None:
    expected = saved("mixtral", tmp_path / "a")
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"], "target_parameters": None}
    other = rewritten(tmp_path / "a", each_expert(MIXTRAL, ".block_sparse_moe."), **targets)
    close(loaded("mixtral", other), expected)


def test_three_axes(tmp_path: Path) -> None:
    expected = saved("qwen3-moe", tmp_path / "a")

    def change(module: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        return {f"{module}.{parameter}.lora_A.weight": A, f"{module}.{parameter}.lora_B.weight": B}

    close(loaded("qwen3-moe", rewritten(tmp_path / "a", change)), expected)


def test_a_factor_shared_by_all_experts(tmp_path: Path) -> None:
    model = model_of("qwen3-moe")
    adapter = lk.attach(model, lk.LoRA(rank=3, alpha=5.0), name="ours", target_modules=["experts"])
    randomise(adapter)
    with torch.no_grad():
        for layer in adapter.layers.values():
            deltas = layer.deltas_of("ours")
            for expert in range(4):
                deltas[f"gate_up_proj.{expert}"].A.copy_(deltas["gate_up_proj.0"].A)
                deltas[f"down_proj.{expert}"].B.copy_(deltas["down_proj.0"].B)
    adapter.save(tmp_path / "a")

    def change(module: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        if parameter == "down_proj":
            return {f"{module}.w2.lora_A.weight": A, f"{module}.w2.lora_B.weight": B[:1]}
        gate, up = B.chunk(2, dim=1)
        found = {f"{module}.w1.lora_A.weight": A[:1], f"{module}.w1.lora_B.weight": gate}
        return {**found, f"{module}.w3.lora_A.weight": A[:1].clone(), f"{module}.w3.lora_B.weight": up}

    close(loaded("qwen3-moe", rewritten(tmp_path / "a", change)), logits(model))


def blockwise(module: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """B with its columns expert by expert, as some versions of Unsloth wrote it."""
    inner = "base_layer." if parameter == "gate_up_proj" else ""
    return {
        f"{module}.{inner}lora_A.weight": A.flatten(0, 1),
        f"{module}.{inner}lora_B.weight": B.permute(1, 0, 2).flatten(1),
    }


def test_columns_expert_by_expert_where_the_file_says_so(tmp_path: Path) -> None:
    expected = saved("qwen3-moe", tmp_path / "a")
    close(loaded("qwen3-moe", rewritten(tmp_path / "a", blockwise, lora_B_layout="grouped_by_expert")), expected)


def unequal(name: str, folder: Path) -> Tensor:
    """An adapter whose experts have moved by different lengths, as trained ones have."""
    model = model_of(name)
    model.config.num_hidden_layers = 2
    adapter = lk.attach(model, lk.LoRA(rank=8, alpha=5.0), name="ours", target_modules=["experts"])
    randomise(adapter)
    with torch.no_grad():
        for _, site, delta in adapter.deltas():
            delta.B.mul_(0.1 * 3**site.layout.index)
    adapter.save(folder)
    return logits(model)


def test_columns_that_only_look_so_are_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.files import experts

    monkeypatch.setattr(experts, "GROUPS", 8)  # this model has two stacks of four experts in two layers
    expected = unequal("qwen3-moe", tmp_path / "a")
    (tmp_path / "a" / OWN).unlink()
    close(loaded("qwen3-moe", tmp_path / "a"), expected)
    (tmp_path / "a" / OWN).write_text("{}")
    with pytest.raises(LorakitError, match=r'expert by expert.*"lora_B_layout": "grouped_by_expert"'):
        loaded("qwen3-moe", rewritten(tmp_path / "a", blockwise))


@pytest.mark.parametrize("version", ["0.18.1", "0.18.0"])
def test_files_of_earlier_versions_that_had_the_factors_the_other_way(version: str, tmp_path: Path) -> None:
    """Sizes tell where a matrix is not square (down_proj); here gate_up_proj is, and goes by down_proj and the version."""
    expected = saved("qwen3-moe", tmp_path / "a")

    def change(module: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        inner = "base_layer." if parameter == "gate_up_proj" else ""
        return {
            f"{module}.{inner}lora_A.weight": B.mT.flatten(0, 1),
            f"{module}.{inner}lora_B.weight": A.permute(2, 1, 0).flatten(1),
        }

    close(loaded("qwen3-moe", rewritten(tmp_path / "a", change, peft_version=version)), expected)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    saved("qwen3-moe", tmp_path / "a")
    short = rewritten(tmp_path / "a", lambda module, parameter, A, B: each_expert(V4)(module, parameter, A, B))
    tensors = {key: value for key, value in load_file(short / TENSORS).items() if ".experts.3.up_proj" not in key}
    tensors = {key: value for key, value in tensors.items() if ".experts.3.gate_proj" not in key}
    save_file(tensors, short / TENSORS)
    with pytest.raises(LorakitError, match="expert 3 is missing"):
        loaded("qwen3-moe", short)


@pytest.mark.parametrize(("name", "router"), [("qwen3-moe", "gate"), ("gpt-oss", "router"), ("mixtral", "gate")])
def test_routers_by_name(name: str, router: str, tmp_path: Path) -> None:
    """Adapted where they are named: merged equal, row by row, and in PEFT's form, where they are parameters."""
    model = model_of(name)
    base, alone = logits(model), {}
    for own in ("a", "b"):
        adapter = lk.attach(model, lk.LoRA(rank=2), name=own, target_modules=[router])
        randomise(adapter)
        with lk.use(model, own):
            alone[own] = logits(model)
        with lk.merged(model, own):
            torch.testing.assert_close(logits(model), alone[own], rtol=1e-4, atol=1e-4)
        assert (alone[own] - base).abs().max() > 0.05
    rows = len(base)
    with lk.use(model, ["b", None, "a"][:rows]):
        expected = torch.stack([alone["b"][0], base[1], alone["a"][2]][:rows])
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    lk.save(adapter, tmp_path / "b")
    close(loaded(name, tmp_path / "b"), alone["b"])
    theirs = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "b")
    close(logits(theirs), alone["b"])
