"""What can be found wrong with a run before a weight of its base is read, and what the run will do.

`check` reads the rows, the tokenizer and the base's configuration alone. A run begins with the same checks, so that a misspelt
column, tracker, optimizer or layer does not wait for a model; `lorakit train --check` stops there and shows what it found.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.attachment import attach
from lorakit.edits.contract import EditMethod
from lorakit.errors import LorakitError, first_line, plural, unknown
from lorakit.experts import RouterSpec
from lorakit.files.bundle import read_bundle, read_config, read_own
from lorakit.files.vocabulary import grow, make_room, token_rows
from lorakit.models import hub
from lorakit.models.device import resolve_device
from lorakit.models.loading import find_local, load_tokenizer
from lorakit.models.stored import outline, stored_config
from lorakit.models.stored import read_config as stored_settings
from lorakit.models.tasks import TASKS, check_task
from lorakit.optim import parameter_groups
from lorakit.optim.optimisers import averages
from lorakit.train.config.options import TrainConfig, TrainOptions
from lorakit.train.continuing import Source, continued, resolved, source_of, speaking
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.examples import Prepared
from lorakit.train.data.reading import load_splits
from lorakit.train.data.rows import Rows
from lorakit.train.data.store import Example
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.rate import with_rate
from lorakit.train.tasks import check_columns, settled, task_of
from lorakit.train.trainer import make_optimizer, make_scheduler, training_arguments

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("lorakit.train")

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",), "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",), "neptune": ("neptune",), "clearml": ("clearml",), "swanlab": ("swanlab",),
    "dvclive": ("dvclive",), "codecarbon": ("codecarbon",), "flyte": ("flytekit",), "azure_ml": ("azureml",),
    "dagshub": ("dagshub", "mlflow"),
}  # fmt: skip
"""transformers' names of experiment trackers, and the packages any of which each needs."""


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        rows: rows to train on, and `held` those to evaluate on, None for none.
        source: the adapter that the run goes on from, None for none.
        prepared: the training examples and their report, and `evaluation` those of the held-out rows; None where the tokenizer
            is in the file of the weights (GGUF).
        adapter: the adapter on the base's shapes, without weights; None where these cannot be had.
        steps: optimiser steps of the run.
        tokenizer: the base's.
    """

    rows: Rows
    held: Rows | None
    source: Source | None
    prepared: Prepared | None
    evaluation: Prepared | None
    adapter: Adapter | None
    steps: int
    tokenizer: Any

    def shown(self, count: int = 2) -> list[str]:
        """The first examples as the model will see them, each learned stretch between ⟦ and ⟧."""
        return [marked(one, self.tokenizer) for one in islice(self.prepared.examples if self.prepared else (), count)]


def marked(example: Example | Encoded, tokenizer: Any) -> str:
    """An example's text, each learned stretch between ⟦ and ⟧; of a task whose label is no token, the label behind it."""
    if isinstance(example, Encoded):
        return f"{tokenizer.decode(example.input_ids)} ⟦{example.expected}⟧"
    pieces, start = [], 0
    flags = [label != IGNORED for label in example.labels]
    for at in range(1, len(flags) + 1):
        if at == len(flags) or flags[at] != flags[at - 1]:
            text = str(tokenizer.decode(example.input_ids[start:at]))
            pieces.append(f"⟦{text}⟧" if flags[start] else text)
            start = at
    return "".join(pieces)


def check_options(options: TrainOptions) -> None:
    """Refuse an optimizer or a tracker that this run could not use.

    Raises:
        LorakitError: with what would work.
    """
    for tracker in options.report_to:
        if tracker in ("none", "all"):
            continue
        if tracker not in TRACKERS:
            raise unknown("experiment tracker", tracker, TRACKERS)
        if not any(importlib.util.find_spec(name) for name in TRACKERS[tracker]):
            raise LorakitError(f"train.report_to: {tracker} is not installed: pip install {TRACKERS[tracker][0]}")
    device = resolve_device(options.device)
    if "paged" in options.optimizer and device.type == "cuda":
        return
    make_scheduler(options, _stepped(options, nn.Parameter(torch.ones(2, 2))), 1, 10)


def _stepped(options: TrainOptions, trial: nn.Parameter) -> torch.optim.Optimizer:
    """The optimiser of a run after one step on a parameter.

    Raises:
        LorakitError: it cannot be had, or cannot take such a step.
    """
    made = make_optimizer(options.optimizer, [{"params": [trial]}], options.learning_rate, options.optimizer_options)
    try:
        if averages(made):
            made.train()  # type: ignore[attr-defined]
        trial.grad = torch.ones_like(trial)
        made.step()
    except Exception as problem:  # another package's: whatever it asks of its caller
        raise LorakitError(
            f"train.optimizer: {options.optimizer} cannot take the steps of a run ({first_line(problem)}); use adamw"
        ) from None
    return made


def state_bytes(options: TrainOptions) -> float:
    """Bytes that the optimiser keeps for each trained number, found by one step of it on a matrix like an adapter's."""
    if "paged" in options.optimizer:  # its moments lie where a GPU is
        return 2.0 if options.optimizer.endswith("8bit") else 8.0
    trial = nn.Parameter(torch.ones(16, 1024))
    kept = [
        one
        for state in _stepped(options, trial).state.values()
        for one in state.values()
        if isinstance(one, torch.Tensor)
    ]
    return sum(one.nbytes for one in kept) / trial.numel()


def check(config: TrainConfig, *, told: bool = True, console: Console | None = None) -> Checked:
    """Check a run without reading the weights of its base; `told`: say in the log what the adapter reaches; `console` is where
    progress over many rows is shown.

    Raises:
        LorakitError: the first thing that is wrong.
    """
    check_options(config.train)
    if config.quantize is not None:
        config.quantize.config(torch.float32)  # refuses a format whose package is missing
    find_local(config.model)
    config = with_task(config)
    for folder in config.adapters:
        read_config(Path(folder))
    source = source_of(config)
    if source is not None:
        read_bundle(source.folder)  # refuses one that is damaged
    rows, held = load_splits(config.data)
    training_arguments(config, evaluates=held is not None)
    task = task_of(config)
    check_columns(task, rows, config)
    classes = task.classes(rows, config)
    tokenizer = adapter = prepared = evaluation = None
    if (place := readable(config.model)) is not None:
        with _quiet(not told):
            config, tokenizer, tokens = speaking(config, rows, load_tokenizer(place, {}), source)
        prepared = task.prepare(rows, tokenizer, config, classes, console, streaming=config.data.streaming)
        evaluation = task.prepare(held, tokenizer, config, classes) if held is not None else None
        with _quiet(not told):
            adapter = on_shapes(config, place, tokenizer, source, tokens)
    if adapter is not None:
        check_space(config, adapter.num_parameters())
        parameter_groups(adapter.named_parameters(), adapter.roles(), 1.0, rates=config.train.rates)
    with _quiet(not told):
        made = config if source is None or adapter is None else resolved(config, adapter)
        with_rate(made, _config_of(config.model))  # which says it
    examples = len(prepared) if prepared is not None else len(rows)
    per_epoch = math.ceil(examples / (config.train.batch_size * config.train.gradient_accumulation))
    steps = config.train.max_steps or math.ceil(per_epoch * config.train.epochs)
    return Checked(rows, held, source, prepared, evaluation, adapter, steps, tokenizer)


def _config_of(base: str) -> Any:
    """transformers' configuration of a base; None where it cannot be read."""
    try:
        return stored_config(base)
    except (LorakitError, OSError):
        return None


def readable(model: str) -> str | None:
    """The place of a base whose configuration and tokenizer can be read without its weights; None for GGUF.

    Raises:
        LorakitError: there is no such place, or its configuration cannot be read.
    """
    local = find_local(model)
    if local is not None and (local.is_file() or not (local / "config.json").exists()):
        return None
    place = hub.find_on_hub(model, {}) if local is None else str(local)
    stored_settings(place)
    return place


def with_task(config: TrainConfig) -> TrainConfig:
    """The run with its task by name, read off its base where it is left open."""
    return config if config.task != "auto" else settled(config, _config_of(config.model))


@contextmanager
def _quiet(asked: bool) -> Iterator[None]:
    """Without what is logged, where the run itself will say it on the loaded base."""
    before = logging.root.manager.disable
    if asked:
        logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def on_shapes(
    config: TrainConfig, place: str, tokenizer: Any, source: Source | None = None, tokens: Sequence[int] = ()
) -> Adapter | None:
    """The adapter of a run on the shapes of its base, on the meta device: targets, ranks and patterns must fit, or the adapter
    that it goes on from (`source`), and there are rows for its new `tokens`. None for a router, which is trained over the
    adapters that it loads."""
    model: Any = outline(place, TASKS[config.task])
    check_task(model.config, config.task, config.model)
    if isinstance(config.method, RouterSpec) or (source is not None and read_own(source.folder).get("members")):
        return None
    if source is not None:
        make_room(model, [source.folder])
        return continued(config, model, source)
    method, arguments = config.method, {**config.attach_arguments(), "init": "default"}
    if isinstance(method, EditMethod):
        method = method.with_tokenizer(tokenizer)
    if tokens:
        grow(model, len(tokenizer))
        arguments["trainable_tokens"] = token_rows(model, tokens, config.modules_to_save)
    return attach(model, method, **arguments)


def check_space(config: TrainConfig, parameters: int) -> None:
    """Refuse a run whose checkpoints do not fit on the disk: float32 tensors and the optimiser's state of each.

    Raises:
        LorakitError: with what is needed and what is free.
    """
    place = Path(config.train.output).absolute()
    while not place.exists():
        place = place.parent
    kept = config.train.save_total_limit or 1
    needed, free = round(parameters * ((4 + state_bytes(config.train)) * kept + 4)), shutil.disk_usage(place).free
    if needed > free:
        raise LorakitError(
            f"train: {plural(kept, 'checkpoint')} and the adapter need {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} "
            "GB free; choose another train.output, or a smaller train.save_total_limit"
        )


def lines(checked: Checked, config: TrainConfig) -> Sequence[str]:
    """What a check found, in words."""
    said: list[str] = []
    for what, one in (("data", checked.prepared), ("evaluation data", checked.evaluation)):
        said += [f"{what}: {line}" for line in one.report.lines()] if one is not None else []
    for number, text in enumerate(checked.shown(), start=1):
        said += ["", f"example {number}, learned between ⟦ and ⟧:", text]
    said += ["", *([f"continues from {config.continue_from}"] if config.continue_from is not None else [])]
    if checked.adapter is not None:
        paths = list(checked.adapter.layers)
        shown = ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")
        said.append(
            f"adapter: {checked.adapter.num_parameters():,} parameters on {plural(len(paths), 'layer')}: {shown}"
        )
    else:
        said.append("adapter: not checked, since the base gives no shapes without its weights here")
    said.append(f"steps: {checked.steps:,}, batch size {config.train.batch_size * config.train.gradient_accumulation}")
    return said
