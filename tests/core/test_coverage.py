"""Coverage is a number: what share of the matrix numbers an adapter reaches, said by attach, plan, train and its card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn
from typer.testing import CliRunner

import lorakit as lk
from cli.conftest import words_tokenizer
from core.test_experts import MODELS, SHARED, SMALL, TOP2, model_of
from lorakit.adapter import coverage as counting
from lorakit.adapter.coverage import Coverage, coverage, coverage_of, planned_coverage
from lorakit.adapter.targets import Targets
from lorakit.cli import app

LAYERS, HIDDEN, EXPERTS, WIDE = 2, 32, 4, 16
ATTENTION = LAYERS * (4 * 8 * HIDDEN * 2 + 2 * 8 * HIDDEN * 2)
STACKS = LAYERS * EXPERTS * 3 * WIDE * HIDDEN
ROUTER = LAYERS * EXPERTS * HIDDEN


def tiny(**options: Any) -> tuple[nn.Module, lk.Adapter]:
    model = model_of("qwen3-moe")
    return model, lk.attach(model, lk.LoRA(rank=2), **options)


def test_experts_reached_are_counted_and_the_router_is_named() -> None:
    found = coverage_of(tiny()[1])
    assert found.total == ATTENTION + STACKS + ROUTER
    assert found.reached == ATTENTION + STACKS
    assert dict(found.left) == {"model.layers.N.mlp.gate.weight": ROUTER}


def test_experts_left_out_are_named() -> None:
    found = coverage_of(tiny(target_modules="attention")[1])
    assert found.reached == ATTENTION
    assert found.kinds() == [
        f"model.layers.N.mlp.experts.gate_up_proj ({2 * STACKS / 3 / found.total:.1%})",
        f"model.layers.N.mlp.experts.down_proj ({STACKS / 3 / found.total:.1%})",
        f"model.layers.N.mlp.gate.weight ({ROUTER / found.total:.1%})",
    ]
    assert all(kind in str(found) for kind in found.kinds())


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"target_modules": ["experts.down_proj"]}, STACKS // 3),
        ({"target_modules": ["q_proj"], "bias": "all"}, LAYERS * HIDDEN * HIDDEN),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, LAYERS * HIDDEN * HIDDEN + STACKS + ROUTER),
        ({"layers": [0]}, (ATTENTION + STACKS) // LAYERS),
    ],
    ids=["one stack", "biases", "saved whole", "one block"],
)
def test_only_what_is_changed_counts(options: dict[str, Any], reached: int) -> None:
    assert coverage_of(tiny(**options)[1]).reached == reached


def test_parts_of_a_fused_layer_count_by_their_rows() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
    adapter = lk.attach(
        model, lk.LoRA(rank=2), target_modules=["0"], bias="all", parts={"0": {"q": (0, 8), "v": (16, 24)}}
    )
    found = coverage_of(adapter)
    assert (found.reached, found.total) == (16 * 8, 2 * 24 * 8)
    assert dict(found.left) == {"0.weight": 8 * 8, "2.weight": 24 * 8}


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe", "mixtral"])
def test_what_is_planned_is_what_comes(name: str) -> None:
    model = model_of(name)
    with torch.device("meta"):
        shapes = MODELS[name]()
    planned = planned_coverage(shapes, lk.LoRA(rank=2), Targets())
    assert planned == coverage_of(lk.attach(model, lk.LoRA(rank=2)))


def test_all_linear_is_all_of_an_ordinary_model() -> None:
    model = T.LlamaForCausalLM(T.LlamaConfig(**SMALL))
    adapter = lk.attach(model, lk.LoRA(rank=2))
    assert coverage_of(adapter) == Coverage(found := coverage(model, adapter.layers).total, found)
    assert str(coverage_of(adapter)) == f"100.0% of the matrix numbers ({found:,} of {found:,})"


def gated() -> T.Qwen2MoeConfig:
    """A model with a gate of one output, in which a preset's rank does not fit."""
    return T.Qwen2MoeConfig(**SMALL, **TOP2, **SHARED, num_experts=4)


def test_a_capped_rank_is_said_once_for_its_kind(caplog: pytest.LogCaptureFixture) -> None:
    model = T.Qwen2MoeForCausalLM(gated())
    with caplog.at_level(logging.WARNING, "lorakit"):
        adapter = lk.attach(model, lk.LoRA(rank=8))
    said = ("model.layers.N.mlp.shared_expert_gate gets rank 1 instead of 8, the most that its 1 × 32 can use",)
    assert coverage_of(adapter).capped == said
    assert caplog.text.count("gets rank") == 1
    assert said[0] in caplog.text


def test_what_is_planned_says_ranks() -> None:
    with torch.device("meta"):
        shapes = T.Qwen2MoeForCausalLM(gated())
    said = planned_coverage(shapes, lk.LoRA(rank=8), Targets()).capped
    assert [text.partition(", ")[0].partition(" ")[2] for text in said] == ["gets rank 1 instead of 8"]
    assert planned_coverage(shapes, lk.LoRA(rank=1), Targets()).capped == ()


def test_a_preset_that_reaches_little_warns(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a preset that no longer takes stacks of experts (the default of 2025, without a word)."""
    chosen = counting.coverage_of
    with caplog.at_level(logging.WARNING, "lorakit"):
        tiny()
        assert "reaches" not in caplog.text
        monkeypatch.setattr(
            "lorakit.adapter.targets._in_presets",
            lambda module: isinstance(module, nn.Linear),
        )
        _, adapter = tiny()
    assert chosen(adapter).share < 0.95
    assert "all-linear reaches" in caplog.text
    assert "model.layers.N.mlp.experts.gate_up_proj" in caplog.text


# -- plan, train, card -----------------------------------------------------------------------------------------------------


def test_plan_says_it(tmp_path: Path) -> None:
    gated().save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--rank", "4", "--length", "16"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    with torch.device("meta"):
        shapes = T.Qwen2MoeForCausalLM(gated())
    expected = planned_coverage(shapes, lk.LoRA(rank=4), Targets())
    assert f"lora reaches {expected}." in shown
    assert "model.layers.N.mlp.gate.weight" in shown
    assert "shared_expert_gate gets rank 1 instead of 4" in shown
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found["lora"]["coverage"] == json.loads(json.dumps(expected.as_dict()))
    assert "coverage" not in found["full"]


def test_train_and_its_card_say_it(tmp_path: Path) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    tokenizer = words_tokenizer()
    T.Qwen2MoeForCausalLM(T.Qwen2MoeConfig(**{**gated().to_diff_dict(), "vocab_size": len(tokenizer)})).save_pretrained(
        base
    )
    tokenizer.save_pretrained(base)
    rows.write_text('{"prompt": "the film was good", "completion": "yes"}\n' * 4)
    words = ["train", "--model", str(base), "--data.train", str(rows), "--rank", "4", "--train.max-steps", "1"]
    words += ["--train.precision", "fp32", "--train.compile", "off", "--train.output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    with torch.device("meta"):
        shapes = T.Qwen2MoeForCausalLM(gated())
    expected = planned_coverage(shapes, lk.LoRA(rank=4), Targets())
    card = (tmp_path / "out" / "README.md").read_text()
    logged = " ".join(done.output.split())
    for text in (logged, card):
        assert f"{expected.share:.1%} of the matrix numbers ({expected.reached:,} of {expected.total:,})" in text
        assert all(kind in text for kind in expected.kinds())
        assert all(sentence in text for sentence in expected.capped)
    assert expected.kinds()
    assert expected.capped
