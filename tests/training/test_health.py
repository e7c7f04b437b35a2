"""The health watch: fed with numbers by hand, it must see what is wrong and keep silent about what is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from lorakit.train.health import HealthCallback, HealthLimits, HealthWatch

QUIET = HealthLimits(window=10)


def feed(watch: HealthWatch, losses: list[float], first_step: int = 1) -> list[str]:
    """Feed losses as consecutive steps with an ordinary gradient; the kinds of what was found."""
    return [f.kind for i, loss in enumerate(losses) for f in watch.step(first_step + i, loss, 1.0)]


def test_a_healthy_run_raises_nothing() -> None:
    watch = HealthWatch(QUIET)
    assert feed(watch, [2.0 - 0.02 * i + 0.1 * (-1) ** i for i in range(60)]) == []
    for step, loss in [(10, 1.9), (20, 1.7), (30, 1.6), (40, 1.55)]:
        assert watch.evaluation(step, loss) == []
    assert watch.findings == []


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "the loss is not a number"),
        (math.inf, 1.0, "the loss is infinite"),
        (1.0, math.nan, "the gradient is not a number"),
        (1.0, math.inf, "the gradient is infinite"),
    ],
)
def test_a_number_that_is_none_skips_the_step(loss: float, norm: float, words: str) -> None:
    watch = HealthWatch()
    (finding,) = watch.step(7, loss, norm)
    assert (finding.action, finding.step, watch.skipped) == ("skipped", 7, 1)
    assert words in finding.text
    assert "parameters are unchanged" in finding.text


def test_several_bad_steps_in_a_row_stop_the_run_and_a_good_one_forgives() -> None:
    watch = HealthWatch(HealthLimits(stop_after=3))
    actions = []
    for step, loss in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan, math.nan], start=1):
        actions += [finding.action for finding in watch.step(step, loss, 1.0)]
    assert actions == ["skipped", "skipped", "skipped", "skipped", "stopped"]
    assert watch.skipped == 5
    assert "3 such steps in a row" in watch.findings[-1].text


def test_a_spike_is_told_once_and_again_after_it_came_back() -> None:
    watch = HealthWatch(QUIET)
    usual = [1.0, 1.1, 0.9, 1.05, 0.95] * 2
    assert feed(watch, [*usual, 5.0, 5.0, 5.1]) == ["spike"]
    assert "5.0 times its running median" in watch.findings[0].text
    assert feed(watch, [*usual, 6.0], first_step=20) == ["spike"]


def test_a_loss_that_always_scatters_is_no_spike() -> None:
    watch = HealthWatch(QUIET)
    # Twice the median, but within what this run does anyway.
    assert "spike" not in feed(watch, [0.6, 2.0, 1.0, 0.5, 2.4, 0.9, 0.4, 2.2] * 4)


def test_a_low_loss_is_told_once() -> None:
    watch = HealthWatch(QUIET)
    assert feed(watch, [1.0] * 10 + [0.1] * 20) == ["low_loss"]
    assert "memorising" in watch.findings[0].text


def test_a_widening_gap_is_told_with_the_best_evaluation() -> None:
    watch = HealthWatch(QUIET)
    kinds = []
    for i, evaluation in enumerate([1.0, 1.05, 1.2, 1.4]):
        feed(watch, [1.0 - 0.2 * i] * 5, first_step=10 * i)
        kinds += [finding.kind for finding in watch.evaluation(10 * i + 5, evaluation)]
    assert kinds == ["gap"]
    assert "its best was 1.000" in watch.findings[0].text


def test_a_tensor_without_gradient_is_named_by_its_layer() -> None:
    watch = HealthWatch(HealthLimits(gradient_steps=3))
    first = {
        "layers.0.q_proj.A": 0.0,
        "layers.0.q_proj.B": 1.0,
        "layers.1.q_proj.A": 0.0,
        "layers.1.q_proj.B": 0.0,
    }
    later = {**first, "layers.0.q_proj.A": 0.5}
    assert watch.gradients(1, first) == []
    assert watch.gradients(2, later) == []
    (finding,) = watch.gradients(3, first)
    assert finding.kind == "no_gradient"
    assert "2 of the adapter's 4 tensors" in finding.text
    assert "layers.1.q_proj" in finding.text
    assert "layers.0.q_proj" not in finding.text
    assert not watch.watches_gradients


def test_the_callback_takes_the_gradients_of_a_bad_step_away() -> None:
    """With AdamW, whose moments and decay would move the parameters even with a zero gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    callback = HealthCallback(HealthWatch(HealthLimits(stop_after=2)), layer.named_parameters())
    state, control = TrainerState(), TrainerControl()

    def run(scale: float) -> None:
        optimizer.zero_grad()
        callback.on_step_begin(None, state, control)
        loss = (layer(torch.ones(1, 3)) * scale).sum()
        loss.backward()
        callback.add_loss(loss.detach())
        callback.on_pre_optimizer_step(None, state, control)
        optimizer.step()

    run(1.0)
    before = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    run(math.nan)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.named_parameters())
    assert not control.should_training_stop
    run(math.nan)
    assert control.should_training_stop
    assert callback.stopped is not None
    assert "2 such steps" in callback.stopped
    run(1.0)
    assert not torch.equal(before["weight"], layer.weight)
