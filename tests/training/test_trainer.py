"""The Trainer of one adapter: exact resume, right normalisation, checkpoints that are refused when they
should be."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.train import run_checkpoint as checkpoint
from lorakit.train.config.run import DataOptions, TrainConfig, TrainOptions
from lorakit.train.step.support import choose_path
from lorakit.train.trainer import LoraTrainer, make_optimizer, training_arguments
from training.tiny import InterruptAt, InterruptionError, Row, llama, rows

PADDED = pytest.param("off", marks=pytest.mark.slow)
"""The path that is not the usual one, where each case takes seconds: it is run with the slow tests."""


def configure(output: Path, method: Any = None, **options: Any) -> TrainConfig:
    defaults = {"batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "precision": "fp32", "fast_path": "off"}
    return TrainConfig(
        model="tiny",
        data=DataOptions(train="rows.jsonl", evaluation_size=8),
        method=method or lk.LoRA(rank=3, alpha=6.0, dropout=0.2),
        train=TrainOptions(output=str(output), **{**defaults, **options}),
    )


def make(
    config: TrainConfig, *callbacks: TrainerCallback, data: list[Row] | None = None, evaluation: list[Row] | None = None
) -> LoraTrainer:
    model = llama()
    torch.manual_seed(config.train.seed)
    adapter = lk.attach(model, config.method, **config.attach_arguments())
    data = rows(24) if data is None else data
    path = choose_path(model, config.train.fast_path)
    return LoraTrainer(model, adapter, config, data, evaluation, path=path, callbacks=callbacks)


def losses(trainer: LoraTrainer) -> list[float]:
    return [event["loss"] for event in trainer.state.log_history if "loss" in event]


def tensors(trainer: LoraTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.adapter.state_dict().items()}


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path: Path) -> None:
    trainer = make(configure(tmp_path, lk.LoRA(rank=8, alpha=16.0), epochs=16), evaluation=rows(8, seed=2))
    base = {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    before = trainer.loss_sums(rows(24)).mean
    trainer.train_from()
    assert trainer.loss_sums(rows(24)).mean < before - 0.2
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())
    assert not trainer.model.training
    evaluations = [event for event in trainer.state.log_history if "eval_loss" in event]
    assert len(evaluations) == 16, "once after each epoch"
    assert evaluations[-1]["eval_perplexity"] == pytest.approx(math.exp(evaluations[-1]["eval_loss"]))
    steps = [event for event in trainer.state.log_history if "loss" in event]
    assert all(0 <= event["token_accuracy"] <= 1 and event["tokens_per_second"] > 0 for event in steps)


@pytest.mark.parametrize("fast_path", [PADDED, "auto"])
@pytest.mark.parametrize(
    ("save_steps", "cut", "accumulation"),
    [(4, 6, 1), (6, 7, 1), (3, 5, 2), (None, 8, 1)],
    ids=["mid-epoch", "at the end of an epoch", "accumulating", "by epochs"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, fast_path: str, save_steps: int | None, cut: int, accumulation: int
) -> None:
    """With dropout, a falling learning rate and shuffled rows: random state, schedule and order must all be
    restored.

    24 rows in batches of 4 are 6 steps an epoch (3 when accumulating 2).
    """
    options: dict[str, Any] = {
        "epochs": 3 * accumulation,
        "save_steps": save_steps,
        "gradient_accumulation": accumulation,
        "weight_decay": 0.01,
        "fast_path": fast_path,
    }
    held_out = rows(6, seed=3)
    whole = make(configure(tmp_path / "whole", **options), evaluation=held_out)
    whole.train_from()

    config = configure(tmp_path / "cut", **options)
    with pytest.raises(InterruptionError):
        make(config, InterruptAt(cut), evaluation=held_out).train_from()
    torch.manual_seed(12345)  # a fresh process has whatever random state it has
    resumed = make(config, evaluation=held_out)
    resumed.train_from(resume=True)

    assert resumed.state.global_step == whole.state.global_step == 18
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) > 10, "the losses must differ for this comparison to mean anything"
    assert_bit_equal(tensors(resumed), tensors(whole))
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 19)), "the metrics of a resumed run have every step once"


def test_the_resume_test_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a resume that forgets the random state must not pass for exact."""
    options: dict[str, Any] = {"epochs": 3, "save_steps": 4}
    whole = make(configure(tmp_path / "whole", **options))
    whole.train_from()
    config = configure(tmp_path / "cut", **options)
    with pytest.raises(InterruptionError):
        make(config, InterruptAt(6)).train_from()
    monkeypatch.setattr(LoraTrainer, "_load_rng_state", lambda self, checkpoint: None)
    torch.manual_seed(12345)
    resumed = make(config)
    resumed.train_from(resume=True)
    assert losses(resumed) != losses(whole)


@pytest.mark.parametrize("fast_path", [PADDED, "auto"])
def test_splitting_a_batch_changes_nothing(tmp_path: Path, fast_path: str) -> None:
    """Rows with very different numbers of labels: a mean of micro-batch means would differ."""
    method = lk.LoRA(rank=3, alpha=6.0)
    runs = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        config = configure(
            tmp_path / str(size),
            method,
            batch_size=size,
            gradient_accumulation=accumulation,
            max_steps=3,
            epochs=1,
            fast_path=fast_path,
        )
        runs.append(make(config))
        runs[-1].train_from()
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-5)
        for name, tensor in tensors(other).items():
            torch.testing.assert_close(tensor, tensors(runs[0])[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fast_path", ["off", "auto"])
def test_two_processes_train_as_one_with_the_same_batch(tmp_path: Path, fast_path: str) -> None:
    """Two processes with batches of 4 against one with 8: the same rows, the same mean over labels, the same steps."""
    from safetensors.torch import load_file

    script = str(Path(__file__).with_name("processes.py"))
    source = Path(lk.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(source)}
    for count, size in ((1, 8), (2, 4)):
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
        done = subprocess.run(
            [*start, script, str(tmp_path / str(count)), str(size), fast_path],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "facts.json").read_text()) for name in ("1", "2"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    alone = load_file(tmp_path / "1" / "tensors.safetensors")
    for name, tensor in load_file(tmp_path / "2" / "tensors.safetensors").items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    trainer = make(configure(tmp_path, max_steps=2, save_steps=2))
    trainer.train_from()
    (folder,) = checkpoint.checkpoints_in(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
        "train.yaml",
        "adapter_state.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "checkpoint.json",
    }
    assert_bit_equal(checkpoint.read_state(folder), tensors(trainer))
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == trainer.adapter.num_parameters()


def interrupt(output: Path, **options: Any) -> tuple[TrainConfig, Path]:
    """A run of 18 steps cut off at the fifth, with checkpoints at the second and fourth; its newest checkpoint."""
    config = configure(output, epochs=3, save_steps=2, **options)
    with pytest.raises(InterruptionError):
        make(config, InterruptAt(5)).train_from()
    return config, checkpoint.checkpoints_in(output)[-1]


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an interrupted run, to be copied and never changed."""
    output = tmp_path_factory.mktemp("cut")
    interrupt(output)
    return output


@pytest.fixture
def interrupted(cut_run: Path, tmp_path: Path) -> tuple[TrainConfig, Path]:
    """A copy of an interrupted run: its configuration, and its newest checkpoint."""
    shutil.copytree(cut_run, tmp_path / "run")
    config = configure(tmp_path / "run", epochs=3, save_steps=2)
    return config, checkpoint.checkpoints_in(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_state.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"],
)
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_refused_with_the_reason(
    interrupted: tuple[TrainConfig, Path], name: str, damage: str
) -> None:
    config, folder = interrupted
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (folder / name).write_bytes(content[:middle] if damage == "truncated" else changed)
    trainer = make(config)
    untouched = tensors(trainer)
    words = {"truncated": "bytes and should have", "changed": "hash differs", "missing": "is missing"}[damage]
    with pytest.raises(LorakitError, match=f"checkpoint-4 is damaged: {name}.*{words}"):
        trainer.train_from(resume=True)
    assert_bit_equal(tensors(trainer), untouched)


def test_a_checkpoint_cut_off_by_a_kill_is_passed_over_and_said_so(
    interrupted: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = interrupted
    (folder / checkpoint.MANIFEST).unlink()
    trainer = make(config)
    with caplog.at_level(logging.INFO, logger="lorakit.train"):
        trainer.train_from(resume=True)
    assert "checkpoint-4, which was not finished" in caplog.text
    assert "resuming from" in caplog.text
    assert "checkpoint-2" in caplog.text
    assert trainer.state.global_step == 18
    cut_off = folder.with_name("checkpoint-99")
    cut_off.mkdir()
    with pytest.raises(LorakitError, match=r"has no checkpoint\.json"):
        make(config).train_from(resume=str(cut_off))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train__weight_decay": 2e-2}, r"train\.weight_decay was 0\.0, is 0\.02"),
        ({"train__batch_size": 2}, r"train\.batch_size was 4, is 2 \(its batches would be others\)"),
        ({"method": lk.LoRA(rank=4, alpha=6.0, dropout=0.2)}, r"method\.rank was 3, is 4 \(the adapter would be"),
        ({"target_modules": "attention"}, r"target_modules was 'all-linear', is 'attention'"),
        ({"train__seed": 5}, r"train\.seed was 0, is 5"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    interrupted: tuple[TrainConfig, Path], change: dict[str, Any], words: str
) -> None:
    config, _ = interrupted
    with pytest.raises(LorakitError, match=words):
        make(config.replace(**change)).train_from(resume=True)


def test_a_checkpoint_of_other_rows_is_refused(interrupted: tuple[TrainConfig, Path]) -> None:
    config, _ = interrupted
    with pytest.raises(LorakitError, match="trained on other rows"):
        make(config, data=rows(24, seed=9)).train_from(resume=True)


def test_options_that_move_no_parameter_may_differ(interrupted: tuple[TrainConfig, Path]) -> None:
    config, _ = interrupted
    trainer = make(config.replace(train__logging_steps=3, train__save_total_limit=1, train__resume=True))
    trainer.train_from(resume=True)
    assert trainer.state.global_step == 18


def test_a_resume_may_change_the_learning_rate_aloud(
    interrupted: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """From the checkpoint on the rates are those of a run that had the new one from its start; the planted bug is transformers'
    own resume, which restores the old rate."""
    config, folder = interrupted
    changed = config.replace(train__learning_rate=5e-2, train__save_steps=7, train__logging_steps=2)
    fresh = make(changed.replace(train__output=str(folder.parents[2] / "fresh")))
    fresh.train_from()
    resumed = make(changed)
    with caplog.at_level(logging.WARNING, logger="lorakit.train"):
        resumed.train_from(resume=True)
    (line,) = [record.getMessage() for record in caplog.records if "resume:" in record.getMessage()]
    for words in (
        "learning_rate was 0.01, is 0.05",
        "save_steps was 2, is 7",
        "logging_steps was 1, is 2",
        "from here on",
    ):
        assert words in line
    rates = [
        {event["step"]: event["learning_rate"] for event in run.state.log_history if "learning_rate" in event}
        for run in (fresh, resumed)
    ]
    late = {step: rate for step, rate in rates[1].items() if step > 4}
    assert list(late) == [6, 8, 10, 12, 14, 16, 18], "logged by the new interval"
    assert late == {step: rates[0][step] for step in late}
    steps = [one.name for one in checkpoint.checkpoints_in(Path(config.train.output))]
    assert steps == ["checkpoint-14", "checkpoint-18"], "saved by the new interval, and at the end"


def test_a_run_cannot_be_made_shorter_than_it_is(interrupted: tuple[TrainConfig, Path]) -> None:
    config, _ = interrupted
    with pytest.raises(LorakitError, match="the checkpoint is of step 4, and the run would now have 3"):
        make(config.replace(train__max_steps=3)).train_from(resume=True)


def test_a_longer_run_goes_on_and_says_what_that_means(
    interrupted: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = interrupted
    trainer = make(config.replace(train__epochs=4))
    with caplog.at_level(logging.WARNING, logger="lorakit.train"):
        trainer.train_from(resume=True)
    assert "train.epochs was 3.0, is 4.0" in caplog.text
    assert trainer.state.global_step == 24


def test_a_fresh_run_does_not_throw_an_interrupted_one_away(interrupted: tuple[TrainConfig, Path]) -> None:
    config, _ = interrupted
    with pytest.raises(LorakitError, match="holds an unfinished run"):
        make(config).train_from()
    assert len(checkpoint.checkpoints_in(Path(config.train.output))) == 2
    checkpoint.finish(Path(config.train.output))
    make(config).train_from()


def test_resume_without_any_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="found no complete checkpoint"):
        make(configure(tmp_path)).train_from(resume=True)
    with pytest.raises(LorakitError, match="there is no checkpoint"):
        make(configure(tmp_path)).train_from(resume=str(tmp_path / "nowhere"))


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path: Path) -> None:
    """A learning rate that ruins the adapter: the best evaluation is not the last one."""

    class Ruin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            if state.global_step >= 6:
                for group in optimizer.param_groups:
                    group["lr"] = 3.0

    config = configure(tmp_path, epochs=2, eval_steps=3, save_steps=3, keep_best=True, scheduler="constant")
    trainer = make(config, Ruin(), evaluation=rows(8, seed=2))
    trainer.train_from()
    events = {event["step"]: event["eval_loss"] for event in trainer.state.log_history if "eval_loss" in event}
    best = min(events, key=lambda step: events[step])
    assert best < 12, "the run must end worse than its best for this test to mean anything"
    assert trainer.evaluate()["eval_loss"] == events[best]
    assert_bit_equal(checkpoint.read_state(tmp_path / f"checkpoints/checkpoint-{best}"), tensors(trainer))


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    config = configure(tmp_path, epochs=50, learning_rate=1e-9, early_stopping_patience=2, save_steps=100)
    trainer = make(config, evaluation=rows(8, seed=2))
    trainer.train_from()
    assert trainer.state.global_step < 100


def test_a_step_that_is_not_finite_changes_nothing_and_several_stop_the_run(tmp_path: Path) -> None:
    """The tensors after three bad steps are those before them; the run ends with the reason."""

    class Break(TrainerCallback):
        before: dict[str, torch.Tensor] | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                self.before = tensors(trainer)
                trainer.path = type(trainer.path)(
                    "broken", lambda *a, **k: (good(*a, **k)[0] * math.nan, good(*a, **k)[1])
                )

    callback = Break()
    trainer = make(configure(tmp_path, epochs=3, weight_decay=0.5), callback)
    good = trainer.path.loss
    trainer.train_from()
    assert trainer.health.watch.skipped == 5
    assert trainer.state.global_step == 9
    assert trainer.health.stopped is not None
    assert callback.before is not None
    assert_bit_equal(tensors(trainer), callback.before)
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_recomputing_blocks_gives_the_same_gradients(tmp_path: Path) -> None:
    from lorakit.train.step.memory import recomputing

    runs = []
    for memory in ("fast", "balanced", "small"):
        trainer = make(configure(tmp_path / memory, max_steps=4, memory=memory))
        with recomputing(trainer.model, memory):
            trainer.train_from()
        runs.append(trainer)
    first = tensors(runs[0])
    assert any(float(tensor.abs().max()) > 0 for name, tensor in first.items() if name.endswith("B"))
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-6)
        for name, tensor in tensors(other).items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-6)


def test_the_optimizer_holds_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    trainer = make(configure(tmp_path, loraplus_ratio=16.0, learning_rate=1e-3, weight_decay=0.1))
    groups = trainer.create_optimizer().param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.adapter.parameters()}
    assert sorted({group["lr"] for group in groups}) == [pytest.approx(1e-3), pytest.approx(16e-3)]
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_an_unknown_optimizer_or_option_is_refused() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    with pytest.raises(LorakitError, match="adamw"):
        make_optimizer("adamv", groups, 1e-3, {})
    with pytest.raises(LorakitError, match="beta"):
        make_optimizer("adamw", groups, 1e-3, {"beta": 0.9})
    assert isinstance(make_optimizer("SGD", groups, 1e-3, {"momentum": 0.9}), torch.optim.SGD)


def test_keep_best_needs_checkpoints_where_it_evaluates(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="multiple of eval_steps"):
        training_arguments(configure(tmp_path, keep_best=True, eval_steps=4, save_steps=6), evaluates=True)


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="no rows to train on"):
        make(configure(tmp_path), data=[])
