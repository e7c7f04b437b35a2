"""DyLoRA: every rank is a LoRA of its own, nested, with the scale alpha / b; gradients reach what was drawn alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.delta import Pool, Shape
from lorakit.errors import LorakitError
from lorakit.methods.dylora import DyLoRADelta

W = torch.zeros(9, 7, dtype=torch.float64)


def random_delta(**options: Any) -> DyLoRADelta:
    torch.manual_seed(0)
    delta = lk.DyLoRA(rank=5, alpha=3.0, **options).build(Shape(9, 7), Pool()).double()
    nn.init.normal_(delta.B)
    return delta


@pytest.mark.parametrize("b", range(1, 6))
@pytest.mark.parametrize("rslora", [False, True])
def test_a_drawn_rank_is_the_lora_of_its_slices(b: int, rslora: bool) -> None:
    delta = random_delta(rslora=rslora)
    delta.drawn = b
    lora = lk.LoRA(rank=b, alpha=3.0, rslora=rslora).build(Shape(9, 7), Pool()).double()
    lora.set_factors(delta.B[:, :b], delta.A[:b])
    torch.testing.assert_close(delta.dense(W), lora.dense(W))
    B, A = delta.truncated(b)
    torch.testing.assert_close(B @ A, lora.dense(W))
    delta.eval()
    torch.testing.assert_close(delta.dense(W), 3.0 / (5**0.5 if rslora else 5) * delta.B @ delta.A)


def test_factors_are_nested() -> None:
    delta = random_delta()
    for b in range(1, 5):
        delta.drawn = b
        B, A = delta.factors()
        delta.drawn = b + 1
        more_B, more_A = delta.factors()
        assert torch.equal(more_B[:, :b], B)
        assert torch.equal(more_A[:b], A)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_what_was_drawn_alone(frozen: bool) -> None:
    delta = random_delta(frozen=frozen)
    delta.drawn = 3
    delta.dense(W).square().sum().backward()
    assert delta.A.grad is not None
    assert delta.B.grad is not None
    moved = delta.A.grad.abs().sum(1) > 0
    assert moved.tolist() == ([False, False, True, False, False] if frozen else [True, True, True, False, False])
    assert torch.equal(delta.B.grad.abs().sum(0) > 0, moved)


def test_the_start_is_loras() -> None:
    torch.manual_seed(0)
    ours = lk.DyLoRA(rank=4).build(Shape(9, 7), Pool())
    torch.manual_seed(0)
    loras = lk.LoRA(rank=4).build(Shape(9, 7), Pool())
    assert torch.equal(ours.A, loras.A)
    assert not ours.B.any()


def test_a_bad_option_says_what_is_wrong() -> None:
    with pytest.raises(LorakitError, match="smallest was given as 6; it is a rank from 1 to rank=4"):
        lk.DyLoRA(rank=4, smallest=6)
