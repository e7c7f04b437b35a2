"""MLX's folder: transposed factors, one scale, one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from conversion.kits import changes, fresh_llama, llama, random, read, same, trained, write
from lorakit.conversion import convert
from lorakit.files.store import read_config

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def folder_of(path: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    write(path / "adapters.safetensors", tensors)
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    (path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, **config})
    )
    return path


def test_a_folder_of_mlx_lm_is_read(tmp_path: Path) -> None:
    model = llama()
    a, b, c, d = random(0, 32, 2), random(1, 2, 32), random(2, 32, 2), random(3, 2, 44)
    tensors = {f"{Q}.lora_a": a, f"{Q}.lora_b": b, f"{UP}.lora_a": c, f"{UP}.lora_b": d}
    done = convert(folder_of(tmp_path / "mlx", tensors), tmp_path / "peft", "peft", base=model)
    assert done.source == "mlx"
    same(changes(model, tmp_path / "peft"), {Q: 20.0 * (a @ b).T, UP: 20.0 * (c @ d).T})
    assert read_config(tmp_path / "peft")["lora_alpha"] == 40.0
    convert(tmp_path / "peft", tmp_path / "again", "mlx")
    again, _ = read(tmp_path / "again" / "adapters.safetensors")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 2,
        "scale": 20.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "mlp.up_proj"],
    }
    assert config["num_layers"] == -1  # every block; layers that the file leaves out start at zero


def test_ranks_are_filled_up_and_come_back(tmp_path: Path) -> None:
    model = llama()
    folder = trained(
        model,
        lk.LoRA(rank=3, alpha=6.0),
        tmp_path / "peft",
        target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 5.0},
    )
    done = convert(folder, tmp_path / "mlx", "mlx")
    assert done.notes == (
        "MLX has one scale: 2; in 2 layers of another scale B is multiplied by it",
        "MLX has one rank: 2 layers of a smaller rank filled up with zeros to 3, which changes nothing",
    )
    assert {
        t.shape for key, t in read(tmp_path / "mlx" / "adapters.safetensors")[0].items() if "up_proj.lora_a" in key
    } == {(32, 3)}
    done = convert(tmp_path / "mlx", tmp_path / "again", "peft")
    assert read_config(tmp_path / "again")["rank_pattern"] == {
        rf"^model\.layers\.{block}\.mlp\.up_proj": 2 for block in range(2)
    }
    same(changes(model, tmp_path / "again"), changes(model, folder))


def test_dora_goes_both_ways(tmp_path: Path) -> None:
    model = llama()
    folder = trained(model, lk.DoRA(inner=lk.LoRA(rank=2, alpha=3.0)), tmp_path / "peft", target_modules=["q_proj"])
    convert(folder, tmp_path / "mlx", "mlx")
    assert read(tmp_path / "mlx" / "adapters.safetensors")[0][f"{Q}.m"].shape == (32,)
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    convert(tmp_path / "mlx", tmp_path / "again", "peft")
    same(changes(model, tmp_path / "again"), changes(model, folder))


def test_what_mlx_cannot_say_or_says_twice_is_refused(tmp_path: Path) -> None:
    pair = {f"{Q}.lora_a": random(0, 32, 2), f"{Q}.lora_b": random(1, 2, 32)}
    cases = (
        ({"fine_tune_type": "full"}, pair, "fine_tune_type 'full': whole weights"),
        ({"fine_tune_type": "dora"}, pair, "the configuration says fine_tune_type='dora'"),
        ({"lora_parameters": {"rank": 2}}, pair, "has no scale in lora_parameters"),
        ({"lora_parameters": {"rank": 2, "alpha": 16, "scale": 10}}, pair, "alpha=16 as well as scale=10"),
        ({"lora_parameters": {"rank": 4, "scale": 10}}, pair, "is of rank 2, and the configuration says rank 4"),
        ({}, {f"{Q}.lora_a": random(0, 4, 32, 2), f"{Q}.lora_b": random(1, 4, 2, 32)}, "experts held together"),
    )
    for number, (config, tensors, words) in enumerate(cases):
        with pytest.raises(lk.LorakitError, match=words):
            convert(folder_of(tmp_path / str(number), tensors, **config), tmp_path / "none", "peft")
    model = llama(tie_word_embeddings=True)
    embedding = trained(model, lk.LoRA(rank=2), tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(lk.LorakitError, match="also changes the head in MLX where the two are tied"):
        convert(embedding, tmp_path / "none", "mlx")
    assert not (tmp_path / "none").exists()


def test_an_untied_embedding(tmp_path: Path) -> None:
    model = llama()
    folder = trained(model, lk.LoRA(rank=2, alpha=3.0), tmp_path / "peft", target_modules=["embed_tokens", "lm_head"])
    convert(folder, tmp_path / "mlx", "mlx", base=model)
    assert read(tmp_path / "mlx" / "adapters.safetensors")[0]["model.embed_tokens.lora_a"].shape == (50, 2)
    convert(tmp_path / "mlx", tmp_path / "again", "peft")
    same(changes(model, tmp_path / "again"), changes(model, folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [lk.LoRA(rank=3, alpha=5.0), lk.DoRA(inner=lk.LoRA(rank=2, alpha=3.0))], ids=lambda m: m.name
)
def test_mlx_lm_gives_the_same_output(method: Any, tmp_path: Path) -> None:
    """Its own model with our weights, and its own loader of adapters."""
    core = pytest.importorskip("mlx.core", reason="MLX is not installed")
    theirs = pytest.importorskip("mlx_lm.models.llama", reason="mlx-lm is not installed")
    tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="mlx-lm is not installed")
    model = fresh_llama()
    config = model.config
    other = theirs.Model(
        theirs.ModelArgs(
            model_type="llama",
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            vocab_size=config.vocab_size,
            tie_word_embeddings=False,
        )
    )
    other.load_weights([(name, core.array(value.numpy())) for name, value in model.state_dict().items()])
    ids = [[3, 8, 1, 40], [9, 2, 7, 7]]

    def output() -> Tensor:
        return torch.tensor(other(core.array(ids)).tolist())

    with torch.no_grad():
        torch.testing.assert_close(output(), model(torch.tensor(ids)).logits, rtol=1e-3, atol=1e-4)
        plain = output()
        folder = trained(model, method, tmp_path / "peft", rank_pattern={"up_proj": 1}, alpha_pattern={"o_proj": 9.0})
        lk.load(model, folder, name="ours")
        convert(folder, tmp_path / "mlx", "mlx")
        tuner.load_adapters(other, str(tmp_path / "mlx"))
        with lk.use(model, "ours"):
            expected = model(torch.tensor(ids)).logits
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(output(), expected, rtol=1e-3, atol=1e-4)
