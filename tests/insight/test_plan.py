"""The planner's bytes against the papers' arithmetic, against tensors that are there, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lorakit as lk
from lorakit.cli import app
from lorakit.errors import LorakitError
from lorakit.insight.plan import activations, bits_per_weight, gigabytes, kept_bytes, outline, packed_bytes, plan
from lorakit.methods import LoRA
from lorakit.models.quantisation import holding
from lorakit.optim import build_optimizer

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **changes})


LARGE = LlamaConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64
)
"""The 65B model of the QLoRA paper."""


def test_nf4_with_double_quantisation_is_4_127_bits() -> None:
    assert round(bits_per_weight("nf4"), 3) == 4.127
    assert bits_per_weight("nf4", double=False) == 4.5
    large = 8192 * 22016
    assert 8 * packed_bytes(large, 22016, "nf4") / large == pytest.approx(4.127, abs=1e-3)
    assert 8 * packed_bytes(large, 22016, "int8") / large == pytest.approx(8, abs=1e-2)
    with pytest.raises(LorakitError, match="unknown format"):
        packed_bytes(64, 1, "nf3")


def test_65_billion_numbers_in_full_take_780_gigabytes_and_48_by_qlora() -> None:
    """Dettmers et al. 2023, section 1: 16-bit weights and gradients and two 32-bit moments, against NF4, on a 48 GB card."""
    whole = plan(LARGE, "full", moments=torch.float32, length=64)
    assert whole.numbers == pytest.approx(65e9, rel=0.01)
    assert whole.base + whole.gradients + whole.optimiser == pytest.approx(780e9, rel=0.01)
    few = plan(LARGE, "qlora", method=LoRA(rank=64), length=512, recompute=True)
    assert few.total < 48 * 2**30
    assert few.total > 40e9, "no miracle either"
    assert few.trained == pytest.approx(0.8e9, rel=0.01)


@pytest.mark.parametrize("config", [{"bnb_4bit_use_double_quant": True}, {"bnb_4bit_use_double_quant": False}, "int8"])
def test_a_quantised_base_takes_what_was_said(tmp_path: Path, config: Any) -> None:
    LlamaForCausalLM(llama()).save_pretrained(tmp_path)
    eight = config == "int8"
    told = {"load_in_8bit": True} if eight else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **config}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**told)
    )
    double = not eight and config["bnb_4bit_use_double_quant"]
    said = plan(llama(), "qlora", method=LoRA(rank=4), form="int8" if eight else "nf4", double=double, length=8)
    assert said.base == holding(model).nbytes


@pytest.mark.parametrize("way", ["full", "galore", "lora"])
def test_a_step_takes_what_was_said(way: Any) -> None:
    """Weights, gradients and the optimiser's tensors after a step, byte by byte."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).to(torch.bfloat16).train()
    said = plan(llama(), way, method=LoRA(rank=4), rank=8, batch=2, length=16)
    assert said.base == sum(p.numel() * p.element_size() for p in model.parameters())
    trained: list[nn.Parameter] = list(model.parameters())
    if way == "lora":
        trained = list(lk.attach(model, LoRA(rank=4)).parameters())
        assert said.adapter == sum(p.numel() * p.element_size() for p in trained)
    options = {"rank": 8} if way == "galore" else {}
    optimiser = build_optimizer("galore" if way == "galore" else "adamw", [{"params": trained, "lr": 1e-3}], **options)
    ids = torch.randint(0, 96, (2, 16))
    model(ids, labels=ids).loss.backward()
    assert said.gradients == sum(p.grad.numel() * p.grad.element_size() for p in trained)
    optimiser.step()
    states = [*optimiser.state.values(), *getattr(optimiser, "_inner", torch.optim.SGD(trained)).state.values()]
    tensors = [t for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    assert said.optimiser == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("method", [LoRA(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activations_are_those_that_autograd_keeps(method: Any, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    config: Any = llama() if kind == "llama" else GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4)
    if kind == "gpt2":
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    said = activations(config, method, batch=2, length=32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    if method is None:
        model.requires_grad_(True)
    else:
        lk.attach(model, method)
    ids = torch.zeros(2, 32, dtype=torch.long)
    there = [*model.parameters(), *model.buffers()]
    found = kept_bytes(lambda: model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state, there)
    assert said == pytest.approx(found, rel=0.1)
    less = activations(config, method, batch=2, length=32, recompute=True)
    assert less < 0.6 * said


def test_nothing_is_allocated() -> None:
    model = outline(LARGE, blocks=1)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(model.model.layers) == 1


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(LorakitError, match="unknown way"):
        plan(llama(), "magic")  # type: ignore[arg-type]
    with pytest.raises(LorakitError, match="rank 500 exceeds the maximum useful rank"):
        plan(llama(), "lora", method=LoRA(rank=500))


def test_the_verb(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--rank", "4", "--length", "32", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"full", "galore", "lora", "qlora"}
    assert found["lora"]["total"] == plan(llama(), "lora", method=LoRA(rank=4), length=32).total
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--rank", "4", "--length", "32"])
    assert "lora on nf4" in done.stdout
    assert gigabytes(found["full"]["total"]) in done.stdout
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--method", "loar"])
    assert done.exit_code == 2
    assert 'did you mean "lora"' in done.stderr
