"""Adapters on experts in the engine: requests of different adapters in one batch, each as alone; else refused at load."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import lorakit as lk
from core.test_expert_verbs import KINDS, model_of
from core.test_experts import MODELS
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model.packed import AdapterReader
from lorakit.serve.request import Refused
from serving.small import VOCABULARY, Oracle, greedy, prompt, write_adapter

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": VOCABULARY,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip


def mixture(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "qwen3-moe":
        model: nn.Module = T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=24))
    else:
        model = T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=4))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_any_mixture_is_as_each_alone(kind: str, tmp_path: Path) -> None:
    base = mixture(kind)
    write_adapter(base, tmp_path / "a", lk.LoRA(rank=3), seed=1)
    write_adapter(base, tmp_path / "b", lk.LoRA(rank=3), seed=2)  # read into the frame of the first
    write_adapter(base, tmp_path / "experts", lk.LoRA(rank=5), seed=3, target_modules=["experts"])
    write_adapter(base, tmp_path / "one", lk.LoRA(rank=2), seed=4, target_modules=["experts.down_proj.1"])
    oracle = Oracle(base, tmp_path)
    engine = LocalEngine(base, tmp_path, Limits(batch=5, step_tokens=24, cache_bytes=64 * 2**13, overtake=64))
    engine.pool.start()
    draw = random.Random(7)
    blends: list[dict[str, float]] = [
        {}, {"a": 1.0}, {"b": 1.0}, {"experts": 1.0}, {"one": 1.0}, {"b": 0.4, "experts": 0.7}
    ]  # fmt: skip
    asked = [greedy(n, prompt(n, draw.randint(1, 30)), blends[n % len(blends)], 8) for n in range(12)]
    tickets = [engine.submit(request) for request in asked]
    while not all(ticket.ended for ticket in tickets):
        engine.step()
    for ticket in tickets:
        assert ticket.tokens() == oracle.answer(ticket.request.prompt, ticket.request.blend, 8), ticket.request
    engine.stop()


def refused(model: nn.Module, folder: Path) -> str:
    with pytest.raises(Refused) as problem:
        AdapterReader(model).read(folder.name, folder)
    return str(problem.value)


@pytest.mark.parametrize("kind", ["jetmoe", "dbrx"])
def test_experts_that_hide_whose_their_tokens_are_are_refused_at_load(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    write_adapter(model, tmp_path / "a", lk.LoRA(rank=2), target_modules=KINDS[kind][1])
    assert "Merge it into a base of its own" in refused(model, tmp_path / "a")


def test_methods_that_are_no_product_are_refused_at_load(tmp_path: Path) -> None:
    model = MODELS["qwen3-moe"]().eval()
    write_adapter(model, tmp_path / "a", lk.DoRA(inner=lk.LoRA(rank=2)), target_modules=["experts"])
    assert "low-rank changes only" in refused(model, tmp_path / "a")


@pytest.mark.parametrize("spec", [lk.Arrow(top_k=1), lk.XLoRA(), lk.MoLE()], ids=["arrow", "xlora", "mole"])
def test_routers_over_adapters_on_experts_are_refused_when_made(spec: Any) -> None:
    model = MODELS["qwen3-moe"]().eval()
    for name in ("a", "b"):
        lk.attach(model, lk.LoRA(rank=2), name=name)
    with pytest.raises(lk.LorakitError, match="multiplies its weights by itself"):
        lk.route(model, spec, ["a", "b"])
    for name in ("c", "d"):
        lk.attach(model, lk.LoRA(rank=2), name=name, exclude_modules=["experts"])
    lk.route(model, spec, ["c", "d"])
