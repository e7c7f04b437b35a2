"""ReLoRA: a restart changes nothing, ranks add up, and what is saved is a plain LoRA that PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.delta import Pool, Shape
from lorakit.errors import LorakitError
from lorakit.methods.lora import start_factors
from reference.models import MODELS, assert_same, logits, quiet, scramble, twin


def random_delta(rank: int = 2) -> Any:
    torch.manual_seed(0)
    delta = lk.ReLoRA(rank=rank, alpha=3.0).build(Shape(9, 7), Pool()).double()
    nn.init.normal_(delta.B)
    return delta


def restart(delta: Any) -> None:
    B, A = start_factors(delta.shape, delta.A.shape[0])
    delta.restart(B.double(), A.double())


def test_a_restart_changes_nothing_and_the_next_stretch_adds_to_it() -> None:
    delta, W = random_delta(), torch.zeros(9, 7, dtype=torch.float64)
    first = delta.dense(W).detach()
    restart(delta)
    assert torch.equal(delta.dense(W), first)
    nn.init.normal_(delta.B)
    torch.testing.assert_close(delta.dense(W), first + 1.5 * delta.B @ delta.A)
    assert torch.linalg.matrix_rank(delta.dense(W)) == 4
    assert sum(p.numel() for p in delta.parameters()) == 2 * (9 + 7), "what was put aside does not train"


def test_what_is_put_aside_never_exceeds_the_smaller_side() -> None:
    delta, W = random_delta(), torch.zeros(9, 7, dtype=torch.float64)
    for _ in range(6):
        before = delta.dense(W).detach()
        restart(delta)
        torch.testing.assert_close(delta.dense(W), before)
        nn.init.normal_(delta.B)
    assert delta.kept()[1].shape[0] == 7


@pytest.mark.parametrize("rslora", [False, True])
def test_saves_as_a_plain_lora(rslora: bool, tmp_path: Path) -> None:
    base = MODELS["llama"]()
    model = twin(base)
    adapter = lk.attach(model, lk.ReLoRA(rank=2, alpha=3.0, rslora=rslora), target_modules=["q_proj", "v_proj"])
    adapter.save(tmp_path / "fresh")
    assert isinstance(lk.load(twin(base), tmp_path / "fresh").method, lk.ReLoRA)
    scramble(adapter.named_parameters(), size=0.4)
    for index, (_, _, delta) in enumerate(adapter.deltas()):
        if index != 1:  # one layer without a restart: ranks differ per layer
            restart(delta)
    scramble(adapter.named_parameters(), size=0.3, seed=5)
    model.eval()
    wanted = logits(model, "llama")
    adapter.save(tmp_path / "a")
    again = twin(base)
    loaded = lk.load(again, tmp_path / "a", trainable=True)
    assert_same(logits(again, "llama"), wanted)
    assert sorted({delta.factors()[1].shape[0] for _, _, delta in loaded.deltas()}) == [2, 4]
    with quiet():
        theirs: Any = peft.PeftModel.from_pretrained(twin(base), str(tmp_path / "a")).eval()
    assert_same(logits(theirs, "llama"), wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every was given as 0"),
        ({"every": 1.5}, "a count of steps, or a share"),
        ({"rewarm": -1}, "rewarm"),
        ({"dropout": 0.1}, "dropout was given as 0.1; it would also act on what earlier stretches have learnt"),
    ],
)
def test_a_bad_option_says_what_is_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LorakitError, match=words):
        lk.ReLoRA(**options)
