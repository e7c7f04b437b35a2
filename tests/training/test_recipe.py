"""The rest of a recipe: optimizers of packages, rates, schedules, averages, noise, fp16, the order of examples, devices."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.optim import build_scheduler
from lorakit.optim.average import Average, settle, used
from lorakit.train import run_checkpoint as checkpoint
from lorakit.train.check import check_options
from lorakit.train.config.run import TrainConfig, TrainOptions
from lorakit.train.order import ByLength
from lorakit.train.rate import suggested
from lorakit.train.step.noise import embedding_noise
from training.test_trainer import assert_bit_equal, configure, losses, make, tensors
from training.tiny import InterruptAt, InterruptionError, Row, rows

RECIPES: dict[str, dict[str, Any]] = {
    "schedule-free": {"optimizer": "adamw-schedule-free"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3},
    "came": {"optimizer": "came"},
    "a package's": {"optimizer": "pytorch_optimizer:ScheduleFreeAdamW"},
    "torch's": {"optimizer": "torch.optim:NAdam"},
    "ema": {"ema": 0.9},
    "neftune": {"neftune": 5.0, "fast_path": "auto"},
    "restarts": {"scheduler": "cosine_with_restarts", "scheduler_options": {"num_cycles": 2}},
    "rex": {"scheduler": "rex", "warmup": 2},
    "plateau": {"scheduler": "reduce_lr_on_plateau", "scheduler_options": {"patience": 0}, "eval_steps": 1},
    "by length": {"group_by_length": True},
    "rates": {"rates": {"layers.0": 1e-3, "B": 2e-2}},
    "fp16": {"precision": "fp16"},
}


SEEN_OFTEN = ("schedule-free", "ema", "fp16", "by length")
"""Recipes with a state of their own; the others are run with the slow tests."""


@pytest.mark.parametrize(
    "recipe", [name if name in SEEN_OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_an_interrupted_run_of_any_recipe_goes_on_bit_for_bit(tmp_path: Path, recipe: str) -> None:
    options: dict[str, Any] = {"epochs": 2, "save_steps": 3, **RECIPES[recipe]}
    data: dict[str, Any] = {"data": rows(16), "evaluation": rows(6, seed=3)}
    whole = make(configure(tmp_path / "whole", **options), **data)
    whole.train_from()
    config = configure(tmp_path / "cut", **options)
    with pytest.raises(InterruptionError):
        make(config, InterruptAt(5), **data).train_from()
    torch.manual_seed(12345)
    resumed = make(config, **data)
    resumed.train_from(resume=True)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) > 6, "the losses must differ for this comparison to mean anything"
    assert_bit_equal(tensors(resumed), tensors(whole))
    assert resumed.evaluate() == whole.evaluate()


# -- optimizers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamm", 'unknown optimizer "adamm"; did you mean "adamw"'),
        ("prodigi", 'did you mean "prodigy"'),
        ("LBFGS", "several times a step"),
        ("torch.optim:LBFGS", "several times a step"),
        ("torch.optim:AdamV", r'unknown optimizer "AdamV" in torch.optim .*did you mean "Adam'),
        ("torch.nn:Linear", r"unknown optimizer \"Linear\" in torch.nn"),
        ("no_such_package.optim:Adam", "no_such_package.optim cannot be imported .*pip install no_such_package"),
        ("SparseAdam", "SparseAdam cannot take the steps of a run .*use adamw"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_before_the_weights(name: str, words: str) -> None:
    with pytest.raises(LorakitError, match=rf"train\.optimizer: .*{words}"):
        check_options(TrainOptions(optimizer=name))


def test_a_package_that_is_missing_is_named_as_pip_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(LorakitError, match="pip install pytorch-optimizer"):
        check_options(TrainOptions(optimizer="lion"))


def test_what_is_evaluated_and_saved_of_a_schedule_free_run_is_the_average(tmp_path: Path) -> None:
    """Its authors' way by hand: x after `eval` is what counts, y is what trains; a look at x moves nothing."""
    config = configure(tmp_path, optimizer="adamw-schedule-free", max_steps=3, save_steps=3)
    trainer = make(config, evaluation=rows(6, seed=3))
    trainer.train_from()
    folder = checkpoint.checkpoints_in(tmp_path)[-1]
    trained, kept = load_file(folder / checkpoint.TRAINED), checkpoint.read_state(folder)
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    for (name, value), own in zip(tensors(trainer).items(), state.values(), strict=True):
        assert torch.equal(value, kept[name]), "what is saved at the end is what is to be used"
        torch.testing.assert_close(value, torch.lerp(trained[name], own["z"], 1 - 1 / 0.9))
    assert any(not torch.equal(trained[name], kept[name]) for name in kept)


# -- rates and schedules ---------------------------------------------------------------------------------------------------


def test_rates_by_pattern(tmp_path: Path) -> None:
    trainer = make(configure(tmp_path, rates={"layers.0": 1e-3, "q_proj": 3e-3, "v_proj.B": 5e-3}, loraplus_ratio=2.0))
    rate = {name: group["lr"] for group in trainer.create_optimizer().param_groups for name in group["names"]}
    expected = {"0.mlp.up_proj.A": 1e-3, "0.self_attn.q_proj.A": 3e-3, "1.self_attn.q_proj.B": 6e-3,
                "1.self_attn.v_proj.B": 1e-2, "1.mlp.up_proj.A": 1e-2, "0.self_attn.v_proj.A": 1e-3}  # fmt: skip
    assert {name: rate[f"model.layers.{name}"] for name in expected} == pytest.approx(expected)
    with pytest.raises(LorakitError, match=r'unknown pattern "q_prj" in rates.*did you mean "q_proj"'):
        make(configure(tmp_path, rates={"q_prj": 1.0})).create_optimizer()


def curve(name: str, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_scheduler(name, optimizer, 2, 22, options)
    found = []
    for _ in range(22):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_rise_fall_and_restart() -> None:
    restarts = curve("cosine_with_restarts", num_cycles=2)
    assert [step for step in range(1, 22) if restarts[step] > restarts[step - 1]] == [1, 2, 12], (
        "warm-up, then one restart"
    )
    rex = curve("rex")
    assert rex[:3] == [0.0, 0.5, 1.0]
    assert rex[12] == pytest.approx(0.5 / 0.75), "half of the fall: (1 - t) / (1 - t / 2)"
    assert min(curve("cosine_with_min_lr")[2:]) >= 0.1
    stable = curve("warmup_stable_decay")
    assert stable[2:19] == [1.0] * 17
    assert stable[21] < 1.0
    with pytest.raises(LorakitError, match=r"scheduler cosine: it refuses its options .*cycles"):
        build_scheduler("cosine", torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 2, 22, {"cycles": 2})
    with pytest.raises(LorakitError, match=r"train\.scheduler_options: scheduler rex: it has no options"):
        check_options(TrainOptions(scheduler="rex", scheduler_options={"power": 2}))


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"scheduler": "cosine", "optimizer": "adamw-schedule-free"}, "needs no schedule; use auto or constant"),
        ({"ema": 0.9, "optimizer": "adamw-schedule-free"}, "averages by itself"),
        ({"rates": {"q_proj": 1.0}, "optimizer": "prodigy"}, "has one rate"),
    ):
        with pytest.raises(LorakitError, match=words):
            configure(tmp_path, **options)
    with pytest.raises(LorakitError, match=r"train\.ema is 0\.9, an average of steps, while adalora changes its ranks"):
        configure(tmp_path, lk.AdaLoRA(), ema=0.9)


class Sized:
    """A configuration of transformers', as far as rates ask."""

    def __init__(self, hidden_size: int, model_type: str = "llama") -> None:
        self.hidden_size, self.model_type = hidden_size, model_type

    def get_text_config(self) -> Sized:
        return self


@pytest.mark.parametrize(
    ("method", "model", "options", "rate", "source"),
    [
        (lk.LoRA(), Sized(4096), {}, 5e-4 * (2000 / 4096) ** 0.781, "LoRA Without Regret.*hidden size 4096"),
        (lk.LoRA(rank=64), Sized(4096, "qwen3"), {}, 5e-4 * (2000 / 4096) ** 0.0775, "LoRA Without Regret"),
        (lk.LoRA(rank=8, alpha=64), Sized(2048), {}, 5e-4 * (2000 / 2048) ** 0.781 / 2, "LoRA Without Regret"),
        (lk.LoRA(), Sized(576), {}, 5e-4 * (2000 / 2048) ** 0.781, "hidden size 576"),
        (lk.Full(), Sized(4096), {}, 5e-5 * (2000 / 4096) ** 0.781, "a tenth of LoRA's"),
        (lk.PromptTuning(), Sized(576), {}, 3e-2, "measured with prompt-tuning"),
        (lk.VeRA(), None, {}, 2e-2, "measured with vera"),
        (lk.HRA(), None, {}, 1e-4, "measured with oft"),
        (lk.RoAd(), None, {}, 1e-3, "no rule is known for road"),
        (lk.LoRA(), Sized(4096), {"optimizer": "prodigy"}, 1.0, "Prodigy"),
        (lk.VeRA(), None, {"optimizer": "lion"}, 4e-3, "fifth for Lion"),
    ],
)
def test_a_rate_is_suggested_with_its_source(
    method: Any, model: Any, options: dict[str, Any], rate: float, source: str, tmp_path: Path
) -> None:
    import re

    found, told = suggested(configure(tmp_path, method, learning_rate=None, **options), model)
    assert found == pytest.approx(rate, rel=0.05)
    assert re.search(source, told)


def test_the_suggested_rate_is_logged_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lorakit.train"):
        trainer = make(configure(tmp_path, learning_rate=None))
    assert 'learning rate 0.00049, as none was given ("LoRA Without Regret", hidden size 24)' in caplog.text
    assert trainer.lora_config.train.learning_rate == trainer.create_optimizer().param_groups[0]["lr"] == 0.00049


# -- averages --------------------------------------------------------------------------------------------------------------


def test_the_average_is_the_sum_by_hand_and_a_look_at_it_moves_nothing() -> None:
    weight = nn.Parameter(torch.zeros(2))
    average, expected = Average([("w", weight)], 0.5), torch.zeros(2)
    for step in range(1, 12):
        with torch.no_grad():
            weight += step
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    trained = weight.detach().clone()
    with used([weight], average, None):
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, trained)
    settle(average, None)
    torch.testing.assert_close(weight.detach(), expected)


def test_a_run_with_ema_ends_with_it_and_keeps_the_best_of_it(tmp_path: Path) -> None:
    plain = make(configure(tmp_path / "plain", max_steps=6))
    plain.train_from()
    averaged = make(configure(tmp_path / "ema", max_steps=6, ema=0.9))
    averaged.train_from()
    assert losses(averaged) == losses(plain), "training is not changed by looking at it"
    assert averaged.average is not None
    for name, value in averaged.average.state_dict().items():
        assert name == "steps" or torch.equal(dict(averaged.adapter.named_parameters())[name], value)
    assert any(not torch.equal(value, tensors(plain)[name]) for name, value in tensors(averaged).items())
    best = make(configure(tmp_path / "best", epochs=2, ema=0.9, keep_best=True), evaluation=rows(6, seed=3))
    best.train_from()
    logged = [event["eval_loss"] for event in best.state.log_history if "eval_loss" in event]
    assert best.evaluate()["eval_loss"] == pytest.approx(min(logged))


# -- noise on embeddings ---------------------------------------------------------------------------------------------------


def alike(count: int) -> list[Row]:
    """Rows of one length: nothing is padded."""
    return [Row(row.input_ids[:6], row.labels[:6]) for row in rows(count)]


def test_neftune_trains_as_with_the_hook_of_transformers_and_trl(tmp_path: Path) -> None:
    method = lk.LoRA(rank=3)
    ours = make(configure(tmp_path / "ours", method, neftune=5.0, max_steps=4), data=alike(16))
    ours.train_from()
    theirs = make(configure(tmp_path / "theirs", method, max_steps=4), data=alike(16))
    embeddings = theirs.bare.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    theirs.train_from()
    silent = make(configure(tmp_path / "silent", method, max_steps=4), data=alike(16))
    silent.train_from()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert losses(ours) != pytest.approx(losses(silent), rel=1e-4)
    assert not ours.bare.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("fast_path", ["off", "auto"])
def test_the_noise_has_the_size_of_each_examples_own_length(tmp_path: Path, fast_path: str) -> None:
    """Uneven rows, padded and packed: the largest noise of each token is alpha / √(L d), none in evaluation."""
    trainer = make(configure(tmp_path, fast_path=fast_path), data=(data := rows(8)))
    seen: list[torch.Tensor] = []
    with embedding_noise(trainer.bare, 5.0), trainer.path.opened(trainer.bare):
        embeddings = trainer.bare.get_input_embeddings()
        handle = embeddings.register_forward_hook(
            lambda module, args, output: seen.append((output - module.weight[args[0]]).detach())
        )
        trainer.bare.train()
        for _ in range(30):
            trainer.path.loss(trainer.bare, data)
        largest = torch.stack(seen).abs().amax((0, 3))
        seen.clear()
        trainer.bare.eval()
        trainer.path.loss(trainer.bare, data)
        assert not seen[0].any()
        handle.remove()
    wanted = sorted(5 / math.sqrt(len(row.input_ids) * 24) for row in data for _ in row.input_ids)
    real = sorted(value for value in largest.flatten().tolist() if value > 0)
    if fast_path == "off":
        wanted = sorted(5 / math.sqrt(len(row.input_ids) * 24) for row in data for _ in range(largest.shape[1]))
    assert real == pytest.approx(wanted, rel=0.05)


# -- fp16 ------------------------------------------------------------------------------------------------------------------


def test_fp16_skips_what_overflows_and_trains_on(tmp_path: Path) -> None:
    plain = make(configure(tmp_path / "fp32", lk.LoRA(rank=3), max_steps=6))
    plain.train_from()
    half = make(configure(tmp_path / "fp16", lk.LoRA(rank=3), max_steps=6, precision="fp16", save_steps=6))
    half.bare.half()
    for parameter in half.adapter.parameters():
        parameter.data = parameter.data.float()
    half.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # far too large: the first steps must overflow
    before = tensors(half)
    seen: list[tuple[bool, float]] = []
    step = half._unscale
    half._unscale = lambda scaler: (step(scaler), seen.append((half.health.overflowed, scaler.get_scale())))[0]  # type: ignore[method-assign]
    half.train_from()
    assert seen[0] == (True, 2.0**59), "skipped, and the scale halved"
    assert_bit_equal(before, tensors(half))
    assert not half.findings, "an overflow is no illness"
    half = make(configure(tmp_path / "again", lk.LoRA(rank=3), max_steps=6, precision="fp16"))
    half.train_from()
    assert losses(half) == pytest.approx(losses(plain), rel=1e-5), "scaling changes nothing where nothing overflows"


def test_fp16_that_overflows_without_a_scale_ends_the_run(tmp_path: Path) -> None:
    trainer = make(configure(tmp_path, precision="fp16", max_steps=9))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for _, parameter in trainer.adapter.named_parameters():
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    trainer.train_from()
    assert trainer.health.stopped is not None
    assert "gradient" in trainer.health.stopped


# -- order and device ------------------------------------------------------------------------------------------------------


def test_examples_of_similar_length_come_together_in_an_order_of_each_epoch() -> None:
    lengths = torch.randint(1, 100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = ByLength(lengths, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(400))
    assert lengths[first[0]] == max(lengths)

    def padding(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, 400, 4)]
        return sum(max(batch) - length for batch in batches for length in batch)

    assert padding(first) < 0.2 * padding(list(range(400)))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_device_that_is_not_there_is_refused_with_those_that_are() -> None:
    for name, words in (("cuda", "is not there .*found cpu"), ("cuda:1", "is not there"), ("gpu", "is no device"),
                        ("mps", "is not there")):  # fmt: skip
        with pytest.raises(LorakitError, match=rf'train\.device: "{name}" {words}'):
            check_options(TrainOptions(device=name))
    check_options(TrainOptions(device="cpu"))
    assert TrainConfig.model_fields["train"].default.device == "auto"
