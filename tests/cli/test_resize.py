"""`lorakit resize`, and the picture of ranks that `inspect` draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.files.store import read_config, read_tensors
from lorakit.insight.picture import draw_ranks, place_of

Run = Callable[..., Result]
PNG = b"\x89PNG\r\n"


def saved(base: Path, folder: Path, method: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = lk.attach(model, method)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapter.save(folder, base=str(base))
    return adapter


def test_resize_writes_the_folder_and_says_what_it_cost(base: Path, lorakit: Run, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a", lk.LoRA(rank=4))
    result = lorakit("resize", str(tmp_path / "a"), "-o", str(tmp_path / "b"), "--rank", "2")
    assert result.exit_code == 0, result.output
    error = lk.resize(adapter, rank=2).error
    assert f"14 layers at rank 2; error of ΔW {error:.2%} overall" in result.stdout
    assert read_config(tmp_path / "b")["r"] == 2
    result = lorakit("resize", str(tmp_path / "a"), "-o", str(tmp_path / "c"), "--energy", "0.8")
    assert result.exit_code == 0, result.output
    assert "on average" in result.stdout or "at rank" in result.stdout


def test_resize_of_another_method_takes_the_base_that_the_file_names(base: Path, lorakit: Run, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", lk.AdaLoRA(rank=3))
    result = lorakit("resize", str(tmp_path / "a"), "-o", str(tmp_path / "b"), "--rank", "2", "--own")
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "b")["peft_type"] == "LORA"
    assert {t.shape[0] for key, t in read_tensors(tmp_path / "b").items() if "lora_A" in key} == {2}


def test_resize_refuses_what_makes_no_sense(base: Path, lorakit: Run, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", lk.LoRA(rank=4))
    for options, words in (
        ((), "either a rank or an energy share"),
        (("--rank", "2", "--own"), "this folder's method is lora"),
    ):
        result = lorakit("resize", str(tmp_path / "a"), "-o", str(tmp_path / "b"), *options)
        assert result.exit_code == 2
        assert words in result.stderr
    result = lorakit("resize", str(tmp_path / "a"), "-o", str(tmp_path / "a"), "--rank", "2")
    assert "is the adapter itself" in result.stderr


def test_inspect_draws_the_ranks_and_knows_adalora(base: Path, lorakit: Run, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a", lk.AdaLoRA(rank=3, alpha=6.0))
    result = lorakit("inspect", str(tmp_path / "a"), "--picture", str(tmp_path / "ranks.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "ranks.png").read_bytes().startswith(PNG)
    path, _, delta = next(iter(adapter.deltas()))
    line = next(line for line in result.stdout.splitlines() if path in line)
    norm = float(torch.linalg.matrix_norm(delta.dense(torch.zeros(1)).detach()))
    assert f"{norm:.4g}" in line


def test_a_layers_place_in_the_picture() -> None:
    assert place_of("model.layers.11.self_attn.q_proj") == ("self_attn.q_proj", 11)
    assert place_of("lm_head") == ("lm_head", 0)


def test_the_picture_differs_where_ranks_do() -> None:
    class Layer:
        def __init__(self, name: str, rank: int) -> None:
            self.name, self.rank = name, rank

    even = draw_ranks([Layer("h.0.q", 4), Layer("h.1.q", 4)])
    assert even.startswith(PNG)
    assert even != draw_ranks([Layer("h.0.q", 4), Layer("h.1.q", 9)])
    assert even == draw_ranks([Layer("h.0.q", 4), Layer("h.1.q", 4)])
