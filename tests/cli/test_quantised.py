"""A base in few bits, from the command line: train, evaluate, merge both ways; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from cli.conftest import words_tokenizer
from lorakit.core.layer import Adapted
from lorakit.core.storage import FLOAT, storage_of
from lorakit.errors import LorakitError
from lorakit.models.loading import load_model
from lorakit.models.quantisation import FORMATS, NF4, Int8, existing, holding, quantisation
from lorakit.train.config.run import load_config, to_yaml

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model whose layers hold whole blocks of 64."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    words = words_tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Questions with one of two answers."""
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"is the {what} {how}", "completion": "yes" if how == "good" else "no"}
             for what in ("film", "play", "book", "song") for how in ("good", "bad")]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines * 4))
    return path


def configured(model: Path, rows: Path, output: Path, *flags: str) -> Any:
    given = ["--model", str(model), "--data.train", str(rows), "--data.evaluation-size", "8", "--rank", "4"]
    given += ["--train.output", str(output), "--train.precision", "fp32", "--train.max-steps", "6"]
    return load_config(None, [*given, "--train.learning-rate", "0.02", "--train.compile", "off", *flags])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_format_trains(wide: Path, rows: Path, tmp_path: Path, name: str, method: str) -> None:
    from lorakit.train.run import train

    result = train(configured(wide, rows, tmp_path / "out", "--quantize", name, "--method", method))
    base = result.adapter.layers["model.layers.0.mlp.up_proj"].base
    storage = storage_of(base, "weight")
    assert storage is not FLOAT
    assert result.after.loss < result.before.loss - 0.05, "it learns"
    assert result.record.quantize == name
    assert storage.label(base, "weight") in result.record.dtype
    assert result.record.base_parameters == sum(p.numel() for p in load_model(wide)[0].parameters())
    assert result.record.base_bytes < 4 * result.record.base_parameters / 1.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'quantize="{name}"' in card
    assert storage.label(base, "weight") in card
    assert yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())["quantize"]["name"] == name


@pytest.mark.parametrize("flags", [("--init", "loftq"), ("--init", "loftq", "--init.principal", "true")])
def test_loftq_reads_the_floats_once_more(wide: Path, rows: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    from lorakit.train.run import train

    result = train(configured(wide, rows, tmp_path / "out", "--quantize", "nf4", *flags))
    assert result.after.loss < result.before.loss - 0.05
    assert json.loads((tmp_path / "out" / "lorakit.json").read_text())["base"]["fingerprint"]["rewritten"]


def test_options_of_a_format(wide: Path) -> None:
    spec = NF4(double=False, compute_dtype="bf16", skip=("down_proj",))
    config = spec.config(torch.float32)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert not config.bnb_4bit_use_double_quant
    model, _ = load_model(wide, dtype="fp32", quantize=spec)
    assert holding(model).packed == {"nf4": 12}, "two blocks of seven layers, less down_proj"
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(model.lm_head) is torch.nn.Linear


def test_the_configuration_reads_back(wide: Path, rows: Path, tmp_path: Path) -> None:
    config = configured(wide, rows, tmp_path, "--quantize", "nf4", "--quantize.skip", "down_proj")
    assert config.quantize == NF4(skip=("down_proj",))
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    plain = configured(wide, rows, tmp_path)
    path.write_text(to_yaml(plain))
    assert plain.quantize is None
    assert load_config(path) == plain


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(LorakitError, match=r'unknown quantisation "nf5".*did you mean "nf4"'):
        quantisation("nf5")
    with pytest.raises(LorakitError, match="bits was given as 5; it is 8, 4, 3, 2 or 1"):
        FORMATS["hqq"](bits=5).config(torch.float32)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(
        LorakitError, match=r"int8 needs the package bitsandbytes, which is not installed.*torchao-int8"
    ):
        Int8().config(torch.float32)


def test_a_quantised_checkpoint_is_recognised(wide: Path, rows: Path, tmp_path: Path) -> None:
    from lorakit.train.run import train

    model, words = load_model(wide, dtype="fp32", quantize="nf4")
    model.save_pretrained(tmp_path / "nf4")
    words.save_pretrained(tmp_path / "nf4")
    again, _ = load_model(tmp_path / "nf4", dtype="fp32")
    assert existing(again.config) == "bitsandbytes"
    assert holding(again).packed == {"nf4": 14}
    result = train(configured(tmp_path / "nf4", rows, tmp_path / "out"))
    assert result.after.loss < result.before.loss
    with pytest.raises(LorakitError, match=r"quantize=int8, but .* is quantised already \(bitsandbytes\)"):
        load_model(tmp_path / "nf4", quantize="int8")
    with pytest.raises(LorakitError, match=r"needs the float weights, but .* is already quantised"):
        train(configured(tmp_path / "nf4", rows, tmp_path / "other", "--init", "loftq"))


def test_paged_states_are_refused_on_a_processor(wide: Path, rows: Path, tmp_path: Path) -> None:
    from lorakit.train.run import train

    flags = ("--quantize", "nf4", "--train.optimizer", "paged-adamw-8bit")
    with pytest.raises(LorakitError, match=r"paged-adamw-8bit.*parameters are on cpu.*Use adamw-8bit"):
        train(configured(wide, rows, tmp_path / "out", *flags))


def test_merge_both_ways(wide: Path, rows: Path, tmp_path: Path, lorakit: Run) -> None:
    """From the floats and an adapter that was trained on NF4: an NF4 model with its error told, or a float model."""
    from lorakit.train.run import train

    result = train(configured(wide, rows, tmp_path / "out", "--quantize", "nf4"))
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad(), lk.use(result.model, result.adapter.name):
        expected = result.model.train()(ids).logits
    done = lorakit("merge", str(wide), str(tmp_path / "out"), "--output", str(tmp_path / "few"))
    assert done.exit_code == 0, done.output
    assert "quantising the merged weights again changes them by" in done.stdout
    few = AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype=torch.float32).train()
    assert holding(few).packed == {"nf4": 14}
    done = lorakit("merge", str(wide), str(tmp_path / "out"), "--output", str(tmp_path / "float"), "--dtype", "fp32")
    assert done.exit_code == 0, done.output
    assert "float32" in done.stdout
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    assert holding(whole).packed == {}
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, expected, atol=1e-4), "the float copy is what was trained"
        off = (few(ids).logits - expected).abs().mean()
    assert 1e-3 < off < 0.5, "the NF4 copy is off by its rounding"


def test_generate_on_a_quantised_base(wide: Path, lorakit: Run) -> None:
    done = lorakit("generate", str(wide), "--prompt", "is it good", "--max-new-tokens", "3", "--quantize", "nf4")
    assert done.exit_code == 0, done.output
    done = lorakit("generate", str(wide), "--prompt", "is it good", "--quantize", "nf5")
    assert done.exit_code == 2
    assert 'unknown quantisation "nf5"' in done.stderr


def test_what_a_model_holds(wide: Path) -> None:
    """Numbers are those of the float model; bytes are codes, scales and the floats that are left."""
    whole, _ = load_model(wide, dtype="fp32")
    few, _ = load_model(wide, dtype="fp32", quantize=NF4(double=False))
    assert holding(whole).packed == {}
    assert holding(whole).nbytes == 4 * holding(whole).numbers
    assert holding(few).numbers == holding(whole).numbers
    linear = sum(
        module.weight.numel() for name, module in whole.named_modules() if name.endswith("_proj")
    )  # fmt: skip
    left = 4 * (holding(whole).numbers - linear)
    assert holding(few).nbytes == left + linear // 2 + 4 * linear // 64 + 14 * 4 * 16
    assert math.isclose(holding(few).nbytes / holding(whole).nbytes, 0.2, abs_tol=0.15)


def test_a_model_that_transformers_quantised_is_adapted_as_it_is(wide: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        wide, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    lk.attach(model, lk.LoRA(rank=2))
    assert isinstance(model.model.layers[0].mlp.up_proj, Adapted)
    assert not isinstance(model.lm_head, Adapted)
