"""No step of training or serving waits for the GPU, but where the tables say why; found without a GPU (`watch.py`)."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import lorakit as lk
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.sampling import Chooser
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model.packed import LayerTensors
from lorakit.serve.request import Request, Sampling
from lorakit.train.config.run import DataOptions, TrainConfig, TrainOptions
from lorakit.train.health import HealthCallback
from lorakit.train.step.support import choose_path
from lorakit.train.trainer import LoraTrainer
from native.watch import HostReads, Reads, move, onto
from serving.small import model, prompt, write_adapter
from training.tiny import InterruptionError, llama, rows

STEPS = 8

MODULES = ("torch.utils._foreach_utils", "torch.optim.optimizer", "torch.nn.utils.clip_grad")


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused optimizers and loops over lists of tensors take the make-believe GPU, as they do a real one."""
    for name in ("_get_fused_kernels_supported_devices", "_get_foreach_kernels_supported_devices"):
        for module in map(importlib.import_module, MODULES):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda: ["cpu", "cuda", "meta"])


class OntoGPU(TrainerCallback):
    """After its first step, which settles what is tried out once, a run goes on on the make-believe GPU for `STEPS` steps."""

    def __init__(self, watch: HostReads, planted: Any = None) -> None:
        self.watch, self.planted, self.trainer = watch, planted, None
        self.inside = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer: Any = self.trainer
        if state.global_step == 1:
            self.watch.__enter__()
            self.inside = True
            moved = move(trainer.bare.modules())
            for group in trainer.optimizer.param_groups:
                group["params"] = [moved[id(one)] for one in group["params"]]
            trainer.optimizer.state.clear()
            if trainer.scaler is not None:
                trainer.scaler._scale, trainer.scaler._growth_tracker = map(
                    onto, (trainer.scaler._scale, trainer.scaler._growth_tracker)
                )
            trainer.health._parameters = dict(trainer.adapter.named_parameters())
            trainer._tr_loss = onto(trainer._tr_loss)
        elif self.planted is not None:
            self.planted(trainer)
        if state.global_step == 1 + STEPS:
            raise InterruptionError


def trained(tmp_path: Path, planted: Any = None, method: Any = None, **options: Any) -> Reads:
    """What the host reads in so many steps."""
    own = {
        "batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "precision": "fp32",
        "fast_path": "auto",
        "save_steps": 99,
    }
    config = TrainConfig(
        model="tiny",
        data=DataOptions(train="rows.jsonl"),
        method=method or lk.LoRA(rank=3),
        train=TrainOptions(output=str(tmp_path), epochs=9, **{**own, **options}),
    )
    model = llama()
    adapter = lk.attach(model, config.method)
    watch = HostReads()
    callback = OntoGPU(watch, planted)
    trainer = LoraTrainer(
        model, adapter, config, rows(8), path=choose_path(model, config.train.fast_path), callbacks=[callback]
    )
    callback.trainer = trainer  # type: ignore[assignment]
    try:
        with pytest.raises(InterruptionError):
            trainer.train_from()
    finally:
        if callback.inside:
            watch.__exit__(None, None, None)
    return watch.found


# What the host may read in STEPS steps, of which every fourth is logged: how often, and why.
TRAINING = {
    ("train/trainer.py", "train_from", "item in trainer._maybe_log_save_evaluate"): (6, "the log shows loss and norm"),
    ("train/trainer.py", "log", "item"): (2, "the log shows the accuracy"),
    ("train/health.py", "_read", "copy"): (
        4,
        "steps are judged at the log and after an epoch; the device skips bad ones itself",
    ),
    ("train/step/last_block.py", "relative_gap", "item"): (1, "a trial, once for a model"),
}
FP16 = {
    ("train/trainer.py", "_unscale", "copy"): (
        STEPS,
        "the loss scale follows from each step, as in torch's GradScaler",
    ),
    ("train/health.py", "_read", "copy"): (STEPS, "read with the scale"),
}
PADDED = {
    ("train/step/loss.py", "padded_loss", "item in masking_utils._ignore_causal_mask_sdpa"): (
        STEPS, "transformers looks whether its mask hides anything; the usual path makes no mask"
    ),
}  # fmt: skip
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "packed": (lk.LoRA(rank=3), {}),
    "dora": (lk.DoRA(inner=lk.LoRA(rank=3)), {}),
    "padded": (lk.LoRA(rank=3), {"fast_path": "off"}),
    "recomputed": (lk.LoRA(rank=3), {"memory": "small"}),
    "accumulated": (lk.LoRA(rank=3), {"gradient_accumulation": 2, "neftune": 5.0}),
    "fp16": (lk.LoRA(rank=3), {"precision": "fp16"}),
}


def unexplained(found: Reads, table: dict[tuple[str, str, str], tuple[int, str]]) -> Reads:
    """Reads beyond those of a table."""
    return Counter({at: count for at, count in found.items() if count > table.get(at, (0, ""))[0]})


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_training_reads_nothing(tmp_path: Path, case: str) -> None:
    method, options = CASES[case]
    found = trained(tmp_path, method=method, **options)
    assert not unexplained(found, {**TRAINING, **{"fp16": FP16, "padded": PADDED}.get(case, {})})
    assert found["train/trainer.py", "log", "item"] == 2, "the steps ran"


def planted_norm(trainer: Any) -> None:
    float(next(iter(trainer.adapter.parameters())).norm())


def planted_mask(trainer: Any) -> None:
    tensor = next(iter(trainer.adapter.parameters()))
    tensor[tensor > 0].sum()


@pytest.mark.parametrize("planted", [planted_norm, planted_mask])
def test_a_planted_read_is_found(tmp_path: Path, planted: Any) -> None:
    left = unexplained(trained(tmp_path, planted), TRAINING)
    assert {at[1] for at in left} == {planted.__name__}
    assert all(count == STEPS for count in left.values())


# -- serving ----------------------------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01},
    "of the largest": {"temperature": 1.0, "top_k": 5, "logprobs": 3},
    "penalised": {"temperature": 0, "presence_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {5: 1.0}},
}


def served(tmp_path: Path, planted: Any = None) -> tuple[Reads, int]:
    """What the host reads in steps of serving with prompts and answers, and how many steps there were."""
    base = model("llama")
    for seed, name in enumerate(("one", "two")):
        write_adapter(base, tmp_path / name, lk.LoRA(rank=2 + seed), seed=seed)
    engine = LocalEngine(base, tmp_path, Limits(batch=4, step_tokens=16, cache_bytes=1 << 20), compiled=False)
    engine.pool.start()
    for name in ("one", "two"):
        engine.pool.load(name)
    watch = HostReads()
    try:
        with watch:
            move(base.modules())
            engine.model.device = torch.device("meta")
            for held in (engine.cache.keys, engine.cache.values):
                held[:] = map(onto, held)
            for entry in engine.pool._entries.values():
                layers: Any = entry.current.adapter.layers  # type: ignore[union-attr]
                for layer, parts in layers.items():
                    layers[layer] = LayerTensors(*(None if part is None else onto(part) for part in parts))
            blends: list[dict[str, float]] = [{}, {"one": 1.0}, {"one": 0.5, "two": 0.5}, {"two": 1.0}]
            tickets = []
            for number, (blend, asked) in enumerate(zip(blends, ASKED.values(), strict=True)):
                sampling = Sampling(max_tokens=5, ignore_eos=True, **asked)
                tickets.append(engine.submit(Request(str(number), tuple(prompt(number, 20)), blend, sampling=sampling)))
            steps = 0
            while engine.step():
                steps += 1
                if planted is not None:
                    planted(engine)
    finally:
        engine.pool.stop()
    assert [ticket.usage.generated for ticket in tickets] == [5] * 4
    return watch.found, steps


def test_a_step_of_serving_reads_its_tokens_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chooser, "generator", lambda self, device: None)  # there is none for the make-believe GPU
    found, steps = served(tmp_path)
    table = {("serve/engine/sampling.py", "choose", "copy"): (steps, "clients get tokens, and requests end by them")}
    assert not unexplained(found, table)
    assert found.total() >= 5


@pytest.mark.parametrize("bad", [(3,), (4, 5, 6, 7, 8)], ids=["one", "a run of them"])
def test_steps_judged_later_are_skipped_as_those_judged_at_once(
    tmp_path: Path, bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real numbers: a loss that is not a number changes no weight, and the watch finds the same."""

    def run(later: bool) -> tuple[dict[str, torch.Tensor], list[str], Any]:
        monkeypatch.setattr(HealthCallback, "_judges_later", lambda self, device: later)
        options = TrainOptions(
            output=str(tmp_path / str(later)),
            batch_size=2,
            max_steps=12,
            learning_rate=1e-2,
            logging_steps=4,
            precision="fp32",
        )
        config = TrainConfig(model="tiny", data=DataOptions(train="rows.jsonl"), method=lk.LoRA(rank=3), train=options)
        torch.manual_seed(0)
        base = llama()
        adapter = lk.attach(base, config.method)
        path, calls = choose_path(base), itertools.count(1)

        def loss(*args: Any, **kwargs: Any) -> Any:
            found, stats = path.loss(*args, **kwargs)
            return (found * float("nan") if next(calls) in bad else found), stats

        trainer = LoraTrainer(base, adapter, config, rows(16), path=dataclasses.replace(path, loss=loss))
        trainer.train_from()
        logged = [event["loss"] for event in trainer.state.log_history if "loss" in event]
        return (
            adapter.state_dict(),
            [str(one) for one in trainer.health.watch.findings],
            (trainer.health.stopped, logged),
        )

    at_once, later = run(False), run(True)
    assert at_once[1:] == later[1:]
    assert len(at_once[1]) == len(bad)
    assert all(torch.equal(tensor, later[0][name]) for name, tensor in at_once[0].items())
