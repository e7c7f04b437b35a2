"""A LoRA out of two models: exact at full rank, the best at less, what is no matrix kept whole, and little memory."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files.store import read_own, read_tensors
from lorakit.models.checkpoint import INDEX, WHOLE, Checkpoint
from reference.models import MODELS, assert_same, logits, quiet, twin


def tuned(name: str, change: Callable[[str, Tensor], Tensor | None]) -> Any:
    """A copy of a model with changed tensors."""
    model = twin(MODELS[name]())
    torch.manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            delta = change(key, parameter)
            if delta is not None:
                parameter.add_(delta)
    return model


def everything(key: str, parameter: Tensor) -> Tensor:
    return torch.randn_like(parameter) * 0.05


def low(key: str, parameter: Tensor) -> Tensor | None:
    """A product of rank 2 in some layers."""
    if not key.endswith(("q_proj.weight", "up_proj.weight")) or ".1." in key:
        return None
    B, A = torch.randn(parameter.shape[0], 2).to(parameter), torch.randn(2, parameter.shape[1]).to(parameter)
    return 0.1 * B @ A


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "convolutions", "attention", "words"])
def test_full_rank_restores_the_model(name: str) -> None:
    base, other = twin(MODELS[name]()), tuned(name, everything)
    targets = {"convolutions": ["one", "two", "head"], "words": ["words", "body"], "attention": ["first", "middle"]}
    found = lk.extract(base, other, energy=1.0, target_modules=targets.get(name, "all-linear"))
    assert found.made.error < 1e-12
    with lk.use(base, "extracted"):
        assert_same(logits(base, name), logits(other, name))
    assert not torch.equal(logits(base, name), logits(other, name))


def test_a_change_of_low_rank_comes_out_at_its_rank() -> None:
    base, other = twin(MODELS["llama"]()), tuned("llama", low)
    found = lk.extract(base, other, energy=1 - 1e-12)
    assert set(found.made.ranks.values()) == {2}
    assert {path.rpartition(".")[2] for path in found.made.ranks} == {"q_proj", "up_proj"}
    assert "model.layers.1.self_attn.q_proj" in found.unchanged
    assert "model.layers.0.mlp.down_proj" in found.unchanged
    assert found.saved == found.left == {}
    with lk.use(base, "extracted"):
        torch.testing.assert_close(logits(base, "llama"), logits(other, "llama"))


def test_the_error_is_the_tail_and_falls_with_the_rank() -> None:
    base, other = twin(MODELS["llama"]()), tuned("llama", everything)
    errors = []
    for rank in (1, 4, 16, 24):
        found = lk.extract(base, other, rank=rank, rest="report", name=f"r{rank}")
        errors.append(found.made.error)
        place = "model.layers.0.mlp.down_proj"
        layer: Any = base.get_submodule(place)
        D = other.get_submodule(place).weight - layer.base.weight
        S = torch.linalg.svdvals(D.detach())
        assert found.made.errors[place] == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-9)
        assert "model.norm.weight" in found.left
        lk.detach(base, f"r{rank}")
    assert errors == sorted(errors, reverse=True)
    energy = lk.extract(base, other, energy=0.8, rest="report")
    assert all(error**2 <= 0.2 for error in energy.made.errors.values())


# -- folders -----------------------------------------------------------------------------------------------------------------


def folders(
    tmp_path: Path, name: str, change: Callable[[str, Tensor], Tensor | None], shard: str = "20KB"
) -> tuple[Any, Any]:
    base, other = twin(MODELS[name]()), tuned(name, change)
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    other.save_pretrained(tmp_path / "tuned")
    return base, other


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_folders_restore_the_model_and_load_in_peft(name: str, tmp_path: Path) -> None:
    base, other = folders(tmp_path, name, everything)
    assert (tmp_path / "base" / INDEX).is_file()
    assert not (tmp_path / "tuned" / INDEX).is_file()
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", energy=1.0, output=tmp_path / "out")
    assert found.made.error < 1e-12
    lk.load(base, tmp_path / "out", name="a")  # the fingerprint of the streamed base is that of the base in memory
    with lk.use(base, "a"):
        assert_same(logits(base, name), logits(other, name))
    if name == "llama":
        with quiet():
            theirs: Any = peft.PeftModel.from_pretrained(twin(MODELS[name]()), str(tmp_path / "out")).eval()
        torch.testing.assert_close(logits(theirs, name), logits(other, name))
    record = read_own(tmp_path / "out")["record"]["extracted"]
    assert record["error"] == found.made.error
    stranger = tuned(name, everything)
    with pytest.raises(LorakitError, match="another base model"):
        lk.load(stranger, tmp_path / "out", name="a")


def test_tied_embeddings_are_kept_for_both(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config).double().eval()
    other = twin(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", energy=1.0, output=tmp_path / "out")
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(found.saved)
    lk.load(base, tmp_path / "out", name="a")
    with lk.use(base, "a"):
        assert_same(logits(base, "llama"), logits(other, "llama"))


def test_memory_stays_near_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time are more tensors of the two models alive than the two of one layer and the two read before."""
    folders(tmp_path, "llama", everything)
    alive: dict[int, int] = {}
    most, reads = 0, 0
    original = Checkpoint.read

    def read(self: Checkpoint, name: str) -> Tensor:
        nonlocal most, reads
        tensor = original(self, name)
        reads += 1
        alive[id(tensor)] = tensor.numel()
        weakref.finalize(tensor, alive.pop, id(tensor), None)
        most = max(most, sum(alive.values()))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2, rest="report", output=tmp_path / "out")
    largest = max(tensor.numel() for tensor in load_file(tmp_path / "tuned" / WHOLE).values())
    assert reads > 2 * 21
    assert most <= 4 * largest
    assert not alive


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    base, other = folders(tmp_path, "llama", everything)
    good = tmp_path / "tuned"

    def changed(name: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
        shutil.copytree(good, tmp_path / name)
        tensors = load_file(good / WHOLE)
        change(tensors)
        save_file(tensors, tmp_path / name / WHOLE)
        return tmp_path / name

    key = "model.layers.0.mlp.up_proj.weight"
    bert = tmp_path / "bert"
    twin(MODELS["bert"]()).save_pretrained(bert)
    (tmp_path / "empty").mkdir()
    for folder, options, words in (
        (good, {}, "extract: give either a rank or an energy share"),
        (good, {"rank": 2, "rest": "keep"}, "rest was given as 'keep'; it is one of save, report, refuse"),
        (good, {"rank": 2, "rest": "refuse"}, "other tensors differ that are no targeted matrix"),
        (good, {"rank": 2, "target_modules": ["nothing"]}, 'no layer matches "nothing"'),
        (tmp_path / "base", {"rank": 2}, "do not differ in any tensor"),
        (tmp_path / "nowhere", {"rank": 2}, "is no folder"),
        (tmp_path / "empty", {"rank": 2}, "holds no safetensors"),
        (bert, {"rank": 2}, "one architecture"),
        (changed("lacks", lambda t: t.pop(key)), {"rank": 2}, f"the tuned model holds no tensor '{key}'"),
        (changed("nan", lambda t: t[key].mul_(float("nan"))), {"rank": 2}, f"{key} of the tuned model holds a NaN"),
        (
            changed("wide", lambda t: t.update({key: torch.ones(41, 24)})),
            {"rank": 2},
            r"is \(40, 24\) in the base and \(41, 24\)",
        ),
    ):
        with pytest.raises(LorakitError, match=words):
            lk.extract(tmp_path / "base", folder, output=tmp_path / "out", **options)
    with pytest.raises(LorakitError, match="output= names the folder"):
        lk.extract(tmp_path / "base", good, rank=2)
    with pytest.raises(LorakitError, match="one of each was given"):
        lk.extract(base, good, rank=2)
    with pytest.raises(LorakitError, match="leave output out"):
        lk.extract(base, other, rank=2, output=tmp_path / "out")
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    (tmp_path / "base" / next(iter(index["weight_map"].values()))).unlink()
    with pytest.raises(LorakitError, match="which is not there"):
        lk.extract(tmp_path / "base", good, rank=2, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_checkpoint_leaves_a_floor(tmp_path: Path) -> None:
    """Rounding a merged LoRA to bfloat16 adds noise of full rank; a given rank takes the LoRA and leaves most of the noise."""
    base, other = twin(MODELS["llama"]()).bfloat16(), tuned("llama", low).bfloat16()
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2, output=tmp_path / "out")
    assert 0 < found.made.error < 0.1
    assert {str(t.dtype) for t in read_tensors(tmp_path / "out").values()} == {"torch.float32"}
