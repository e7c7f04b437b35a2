"""loralib's state dict: no scale in the file, so it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorakit as lk
from conversion.kits import changes, llama, random, read, same, trained, write
from lorakit.conversion import convert

V, EMBED = "model.layers.0.self_attn.v_proj", "model.embed_tokens"


def test_alpha_is_asked_for(tmp_path: Path) -> None:
    model = llama()
    A, B = random(0, 4, 32), random(1, 16, 4)
    file = write(tmp_path / "a.safetensors", {f"{V}.lora_A": A, f"{V}.lora_B": B})
    with pytest.raises(lk.LorakitError, match=r"does not say the scale\. Give alpha"):
        convert(file, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()
    convert(file, tmp_path / "peft", "peft", alpha=2.0)
    same(changes(model, tmp_path / "peft"), {V: 0.5 * B @ A})


def test_an_embedding_is_told_by_the_base(tmp_path: Path) -> None:
    model = llama()
    A, B = random(0, 4, 50), random(1, 32, 4)
    file = write(tmp_path / "a.safetensors", {f"{EMBED}.lora_A": A, f"{EMBED}.lora_B": B})
    with pytest.raises(lk.LorakitError, match="may be an embedding or a linear layer"):
        convert(file, tmp_path / "peft", "peft", alpha=2.0)
    convert(file, tmp_path / "peft", "peft", alpha=2.0, base=model)
    same(changes(model, tmp_path / "peft"), {EMBED: 0.5 * (B @ A).T})


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    model = llama()
    folder = trained(
        model, lk.LoRA(rank=3, alpha=6.0), tmp_path / "peft", rank_pattern={"k_proj": 2}, alpha_pattern={"o_proj": 3.0}
    )
    done = convert(folder, tmp_path / "a.safetensors", "loralib")
    assert done.notes == (
        "loralib has one alpha: 6; in 2 layers of another scale B is multiplied by it",
        "loralib's layers are built in Python: lora_alpha=6, r=2, 3; the file does not say",
    )
    tensors, metadata = read(tmp_path / "a.safetensors")
    assert metadata["lora_alpha"] == "6.0"
    layer = done.description.components[""][V]
    assert torch.equal(tensors[f"{V}.lora_A"], layer.tensors["A"])
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft")
    same(changes(model, tmp_path / "again"), changes(model, folder))


def test_a_merged_layer_is_refused(tmp_path: Path) -> None:
    """MergedLinear(enable_lora=[True, False, True]): A has two ranks' rows, B two thirds of the outputs."""
    file = write(tmp_path / "a.safetensors", {f"{V}.lora_A": random(0, 8, 32), f"{V}.lora_B": random(1, 64, 4)})
    with pytest.raises(
        lk.LorakitError, match=r"ranks that do not match: A \(8, 32\), B \(64, 4\)\. If it is loralib's"
    ):
        convert(file, tmp_path / "peft", "peft", alpha=2.0)


def test_alpha_is_refused_where_the_file_says_it(tmp_path: Path) -> None:
    folder = trained(llama(), lk.LoRA(rank=2), tmp_path / "peft", target_modules=["q_proj"])
    with pytest.raises(lk.LorakitError, match="alpha was given, and peft's format says its scale itself"):
        convert(folder, tmp_path / "a.safetensors", "loralib", alpha=2.0)
