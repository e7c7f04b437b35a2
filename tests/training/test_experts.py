"""Experts of real architectures in training: the balance that a configuration asks for, routers, whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import lorakit as lk
from lorakit.train.config.run import DataOptions, TrainConfig, TrainOptions
from lorakit.train.step import loss as step_loss
from lorakit.train.step.packing import pad
from lorakit.train.step.support import choose_path
from lorakit.train.trainer import LoraTrainer
from training.tiny import VOCABULARY, Row, rows

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[..., Any]] = {
    "qwen3-moe": lambda **more: T.Qwen3MoeForCausalLM(
        T.Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, router_aux_loss_coef=0.3, **more)
    ),
    "gpt-oss": lambda **more: T.GptOssForCausalLM(
        T.GptOssConfig(**SMALL, num_local_experts=4, router_aux_loss_coef=0.3, **more)
    ),
    "mixtral": lambda **more: T.MixtralForCausalLM(
        T.MixtralConfig(**SMALL, num_local_experts=4, router_aux_loss_coef=0.3, **more)
    ),
    "jetmoe": lambda **more: T.JetMoeForCausalLM(
        T.JetMoeConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2,
            kv_channels=8, num_local_experts=4, num_experts_per_tok=2, aux_loss_coef=0.3, pad_token_id=0, **more,
        )
    ),
}  # fmt: skip


def trainer_of(name: str, output: Path, fast_path: str, targets: Any) -> LoraTrainer:
    torch.manual_seed(0)
    model = MODELS[name](output_router_logits=True)
    config = TrainConfig(
        model="tiny",
        data=DataOptions(train="rows.jsonl", evaluation_size=4),
        method=lk.LoRA(rank=2),
        target_modules=targets,
        train=TrainOptions(output=str(output), fast_path=fast_path, precision="fp32", batch_size=4),
    )
    adapter = lk.attach(model, config.method, **config.attach_arguments())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2)
    path = choose_path(model, fast_path)
    assert path.name.startswith("off") == (fast_path == "off"), path.name
    return LoraTrainer(model, adapter, config, rows(8), None, path=path)


def both(trainer: LoraTrainer, batch: list[Row]) -> tuple[Tensor, Tensor]:
    """lorakit's loss of a batch, and transformers' own, each with its gradients on the adapter."""
    found: list[Tensor] = []
    for own in (True, False):
        trainer.bare.zero_grad()
        if own:
            with trainer.path.opened(trainer.bare):
                loss = trainer.compute_loss(trainer.bare, batch)
                loss.backward()
        else:
            loss = trainer.bare(**pad(batch)).loss
            loss.backward()
        flat = [parameter.grad.flatten() for parameter in trainer.adapter.parameters() if parameter.grad is not None]
        found.append(torch.cat([loss.detach().reshape(1), *flat]))
    return found[0], found[1]


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("name", MODELS)
def test_the_balance_is_part_of_the_loss(name: str, fast_path: str, tmp_path: Path) -> None:
    """Rows with a common prefix, which a packed batch has once and the balance counts for each."""
    trainer = trainer_of(name, tmp_path, fast_path, "all-linear")
    own, expected = both(trainer, rows(4, prefix=40))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_a_forgotten_balance_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("qwen3-moe", tmp_path, "auto", "all-linear")
    monkeypatch.setattr(step_loss, "note_balance", lambda *_: None)
    own, expected = both(trainer, rows(4, prefix=40))
    assert float((own - expected)[0].abs()) > 0.1


def test_a_balance_that_counts_a_shared_prefix_once_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of("qwen3-moe", tmp_path, "auto", "all-linear")
    note = step_loss.note_balance
    monkeypatch.setattr(step_loss, "note_balance", lambda model, found, counts: note(model, found, counts.clamp(max=1)))
    own, expected = both(trainer, rows(4, prefix=40))
    assert float((own - expected)[0].abs()) > 1e-4


def test_evaluation_has_the_loss_of_tokens_alone(tmp_path: Path) -> None:
    trainer = trainer_of("qwen3-moe", tmp_path, "auto", ["experts"])
    sums = trainer.loss_sums(rows(4))
    trainer.bare.eval().config.output_router_logits = False
    torch.testing.assert_close(sums.mean, float(trainer.bare(**pad(rows(4))).loss.detach()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "router"), [("qwen3-moe", "gate"), ("gpt-oss", "router"), ("mixtral", "gate")])
def test_routers_are_trained_where_they_are_named(name: str, router: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, "auto", [router])
    assert all(path.endswith(f"mlp.{router}") for path in trainer.adapter.layers)
    own, expected = both(trainer, rows(4, prefix=40))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainer.adapter.parameters())
