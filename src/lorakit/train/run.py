"""One training run from a configuration to an adapter folder: `train(config)`.

In order: the rows are read (a misspelt column should not wait for a model), the base is loaded, the rows become tokens, the
adapter is attached, the base is measured, the adapter is trained and measured, and the folder is written: the adapter, its
model card, the exact configuration, the metrics and the curves. What a person would want to know on the way (which number
format and why, fast path or padded batches and why, what became of the rows) is logged in words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console

from lorakit.adapter.attachment import attach
from lorakit.adapter.coverage import coverage_of
from lorakit.core.using import use
from lorakit.edits.contract import EditMethod
from lorakit.errors import LorakitError, plural
from lorakit.experts import RouterSpec
from lorakit.experts.attachment import route
from lorakit.files.prompt import Prompt, read_prompt
from lorakit.files.store import load
from lorakit.files.vocabulary import grow, make_room, token_rows
from lorakit.models.device import resolve_device
from lorakit.models.loading import load_model, random_modules
from lorakit.models.quantisation import Holding, holding
from lorakit.models.tasks import check_finite
from lorakit.train import run_checkpoint as checkpoint
from lorakit.train.check import check, with_task
from lorakit.train.config.run import TrainConfig, to_yaml
from lorakit.train.continuing import continued, plain_options, resolved, speaking
from lorakit.train.data.calibration_batches import calibration_batches
from lorakit.train.data.classification import LabelledExample
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.examples import Prepared
from lorakit.train.evaluate import Answer, Evaluation, EvaluationSet, in_words
from lorakit.train.report import RunRecord, write_report
from lorakit.train.step.loss import LossPath, prompt_length
from lorakit.train.step.memory import recomputing
from lorakit.train.tasks import task_of
from lorakit.train.trainer import LoraTrainer

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter
    from lorakit.train.data.rows import Rows

log = logging.getLogger("lorakit.train")


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `before` and `after` are None where there were no rows to evaluate on; `stopped` is the
    reason where the health watch ended the run."""

    folder: Path
    record: RunRecord
    adapter: Adapter
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)

    @property
    def before(self) -> Evaluation | None:
        """The base model's measurements."""
        return self.record.before

    @property
    def after(self) -> Evaluation | None:
        """The trained adapter's measurements."""
        return self.record.after

    @property
    def stopped(self) -> str | None:
        """Why the run ended early, if the health watch ended it."""
        return self.record.stopped


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Carry out a run.

    `console` is where progress is shown; None shows none. Log lines go to the logger "lorakit" either way.

    Raises:
        LorakitError: the model or the rows cannot be read or used, the configuration asks for what cannot be,
        a checkpoint to resume from is unusable, or the output folder holds an unfinished run.
    """
    options = config.train
    with contextlib.ExitStack() as stack:
        if not int(os.environ.get("RANK", "0")):  # one process of several writes
            stack.enter_context(checkpoint.claimed(Path(options.output), options.resume, config.overwrite))
        beside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return _run(config, console, beside)


def _run(config: TrainConfig, console: Console | None, beside: Path) -> TrainResult:
    """The run; `beside` is a folder for what belongs to the adapter and has no other place before it is saved."""
    options = config.train
    if options.resume and config.data.date is None:
        config = config.replace(
            data__date=checkpoint.date_of(checkpoint.find_checkpoint(Path(options.output), options.resume))
        )
    config = with_task(config)
    task = task_of(config)
    checked = check(config, told=False, console=console)
    train_rows, held_rows, source = checked.rows, checked.held, checked.source
    device = resolve_device(options.device)
    model, tokenizer = load_base(config, train_rows, device=None if device.type == "cpu" else str(device))
    check_finite(model, config.model)
    task.check_model(model, config.model)
    classes = task.classes(train_rows, config)
    config, tokenizer, tokens = speaking(config, train_rows, tokenizer, source)
    if source is not None:
        make_room(model, [source.folder])
    if tokens:
        grow(model, len(tokenizer))
    streaming = config.data.streaming
    prepared = checked.prepared or task.prepare(train_rows, tokenizer, config, classes, console, streaming=streaming)
    _report("data", prepared)
    held = None
    if held_rows is not None:
        held = evaluation_set(held_rows, tokenizer, config, classes, checked.evaluation)

    base = holding(model)
    transformers.set_seed(options.seed)
    drawn = (prepared.examples, config.init, options.seed, task.calibration(model))
    batches = calibration_batches(*drawn) if source is None else None
    if batches is not None:
        needs = (config.init.name, config.init.needs, plural(len(batches), "batch", "batches"))
        log.info("init %s measures the %s of every layer on %s", *needs)
    if source is not None:
        adapter = continued(config, model, source, classes)
        config = resolved(config, adapter)
    elif isinstance(config.method, RouterSpec):
        adapter = _routed(config, model)
    else:
        method = config.method.with_tokenizer(tokenizer) if isinstance(config.method, EditMethod) else config.method
        originals = float_weights(config, model)
        arguments = {**attach_arguments(config, model), "batches": batches, "originals": originals}
        rows = token_rows(model, tokens, arguments["modules_to_save"] or ())
        adapter = attach(model, method, **arguments, trainable_tokens=rows)
    adapter.prompt = (prepared.prompt if source is None else source.along(prepared.prompt)) or adapter.prompt
    if tokens:
        tokenizer.save_pretrained(beside)
        adapter.prompt = dataclasses.replace(adapter.prompt or Prompt(None), tokenizer=beside)
    log.info("adapter: %s", describe(adapter, base.numbers))
    path = task.path(model, config)
    with contextlib.ExitStack() as stack:
        if options.compile == "auto":
            _fuse(model, stack)
        before = _measure_base(model, tokenizer, held, config, path) if held else None
        stack.enter_context(recomputing(model, options.memory))
        evaluated = held.examples if held else None
        trainer = LoraTrainer(model, adapter, config, prepared.examples, evaluated, path=path, console=console)
        lineage = [] if source is None else list(source.lineage)
        trainer.record["lineage"] = lineage
        config = trainer.lora_config  # with the learning rate, where it was left open
        start = time.perf_counter()
        trainer.train_from(options.resume)
        seconds = time.perf_counter() - start
        with use(model, adapter.name):
            after = examine(model, tokenizer, held, config, path) if held else None
    record = _record(config, adapter, tokenizer, base, prepared, held, trainer, before, after, seconds)
    record = dataclasses.replace(record, lineage=lineage)
    history = list(trainer.state.log_history)
    if trainer.is_world_process_zero():
        adapter.save(options.output, base=config.model, record=record.as_dict())
        adapter.prompt = read_prompt(options.output)
        write_report(options.output, record, to_yaml(config.replace(overwrite=False)), history)
        if record.stopped is None:
            checkpoint.finish(Path(options.output))
        log.info("adapter saved to %s", options.output)
    return TrainResult(Path(options.output), record, adapter, model, tokenizer, history)


def end_processes() -> None:
    """End what ties the processes of one run together, where there are several (`torchrun`); call it last in a program.

    A process that exits with the group still open may be aborted by its own communication threads, now and then and with
    all work done. `train` leaves the group open, since a program may train again.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # none may leave while another still sends to it
        torch.distributed.destroy_process_group()


def load_base(config: TrainConfig, train_rows: Rows, device: str | None = None) -> tuple[Any, Any]:
    """The base of a run and its tokenizer; for a task with a new head (for the classes of the training rows), one that is the
    same for the same seed."""
    task = task_of(config)
    names = task.classes(train_rows, config)
    if names is not None:
        log.info("classes: %s", ", ".join(names))
    return load_for(config, names, device)


def load_for(config: TrainConfig, classes: Sequence[str] | None, device: str | None = None) -> tuple[Any, Any]:
    """The base of a run and its tokenizer, with a head for classes that are known."""
    task = task_of(config)
    if task.head != "none":
        transformers.set_seed(config.train.seed)
    options = {"task": config.task, "quantize": config.quantize, **task.model_options(classes)}
    model, tokenizer = load_model(config.model, dtype=config.train.precision, device=device, **options)
    task.settle(model)
    return model, tokenizer


def float_weights(config: TrainConfig, model: Any) -> dict[str, Any] | None:
    """The float weights of a base that was quantised as it was read, where the start answers the error of that."""
    if not config.init.rewrites or not holding(model).packed:
        return None
    if config.quantize is None:
        raise LorakitError(
            f"init {config.init.name} corrects the quantisation error and needs the float weights, but {config.model} is "
            "already quantised. Use the float model, and quantise it with quantize."
        )
    log.info("init %s: loading the float weights of %s", config.init.name, config.model)
    floats, _ = load_model(config.model, dtype=config.train.precision, task=config.task)
    return dict(floats.named_parameters())


def _float_dtype(model: Any) -> str:
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def attach_arguments(config: TrainConfig, model: Any) -> dict[str, Any]:
    """The arguments of `attach`: those of the configuration, and the modules that start at random and must be trained: the
    task's head, and what else the checkpoint lacks."""
    arguments = config.attach_arguments()
    task = task_of(config)
    if task.head != "none" and not config.modules_to_save:
        heads = list(random_modules(model))
        if task.head == "outside":
            outside = heads_of(model)
            if not outside:
                raise LorakitError(
                    f"train: {type(model).__name__} has no head beside its backbone; name it in modules_to_save, since it "
                    "starts at random and must be trained"
                )
            heads = [*outside, *(name for name in heads if name.partition(".")[0] not in outside)]
        arguments["modules_to_save"] = heads or None
    return arguments


def heads_of(model: Any) -> list[str]:
    """The modules with parameters that stand beside a transformers model's backbone."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and child is not model.base_model and any(True for _ in child.parameters())
    ]


def evaluation_set(
    rows: Rows,
    tokenizer: Any,
    config: TrainConfig,
    classes: Sequence[str] | None = None,
    prepared: Prepared | None = None,
) -> EvaluationSet:
    """Evaluation rows made ready for what the task measures on them; `classes` are the task's, `prepared` the examples if they
    are made already."""
    task = task_of(config)
    prepared = prepared or task.prepare(rows, tokenizer, config, classes)
    _report("evaluation data", prepared)
    return task.held(rows, tokenizer, config, classes, prepared)


def _report(what: str, prepared: Prepared) -> None:
    """What became of the rows, in the log."""
    for line in prepared.report.lines():
        log.info("%s: %s", what, line)


def examine(model: Any, tokenizer: Any, held: EvaluationSet, config: TrainConfig, path: LossPath) -> Evaluation:
    """Measure the route in use on the held-out rows, by the loss path of the run and the metric of its task."""
    return task_of(config).examine(model, tokenizer, held, config, path)


def describe_targets(config: TrainConfig) -> str:
    """What the adapter of a run changes, in words."""
    if isinstance(config.method, EditMethod):
        return "the places of its edits"
    targets = config.target_modules
    return targets if isinstance(targets, str) else ", ".join(targets)


def describe(adapter: Adapter, base_parameters: int) -> str:
    """An adapter in one line: its method, how many layers, how large, against the base."""
    options = ", ".join(
        f"{name} {value}" for name, value in plain_options(adapter.method).items() if value not in (None, False, ())
    )
    places = len(adapter.edits)
    where = f"at {plural(places, 'place')}" if places else f"on {plural(len(adapter.layers), 'layer')}"
    count = adapter.num_parameters()
    return (
        f"{type(adapter.method).__name__} ({options}) {where}, {count:,} parameters, "
        f"{100 * count / max(base_parameters, 1):.2f}% of the base's {base_parameters:,}"
    )


def _measure_base(
    model: Any, tokenizer: Any, held: EvaluationSet, config: TrainConfig, path: LossPath
) -> Evaluation | None:
    if not config.evaluate.before_and_after:
        return None
    with use(model, None):
        before = examine(model, tokenizer, held, config, path)
    log.info("before training: %s", in_words(before.numbers()))
    return before


def _routed(config: TrainConfig, model: Any) -> Adapter:
    """The router of a run over the adapters that it names."""
    names = [load(model, folder, active=False).name for folder in config.adapters]
    adapter = route(model, config.method, names, name=config.name)
    if not adapter.num_parameters(trainable=True):
        raise LorakitError(
            f"train: {config.method.name} has no trainable parameters; make the router with "
            f"lk.route(model, lk.{type(config.method).__name__}(...), names), and save it"
        )
    return adapter


def _fuse(model: Any, stack: contextlib.ExitStack) -> None:
    """Fuse the model's elementwise operations for the time of the run, where there is a compiler."""
    from lorakit.train.step.fusion import fused

    with use(model, None):  # a fused module must give what the base's gives; a mixture around it is not part of it
        report = stack.enter_context(fused(model))
    if report.reason is not None:
        log.info(report.line())
    else:
        stack.callback(lambda: log.info(report.line()))  # at the end, when it is known what compiling took


def _record(
    config: TrainConfig,
    adapter: Adapter,
    tokenizer: Any,
    base: Holding,
    prepared: Prepared,
    held: EvaluationSet | None,
    trainer: LoraTrainer,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
) -> RunRecord:
    options = config.train
    assert options.learning_rate is not None
    names = ("lorakit", "torch", "transformers", "peft")
    versions = {"python": platform.python_version()} | {name: found for name in names if (found := _version(name))}
    task = task_of(config)
    world = trainer.args.world_size
    return RunRecord(
        name=Path(options.output).name,
        base=config.model,
        task=config.task,
        facts=task.facts(trainer.bare),
        classes=list(prepared.names),
        prompt=_shown_prompt(tokenizer, next(iter(prepared.examples))),
        method=type(config.method).__name__,
        method_options=plain_options(config.method),
        targets=describe_targets(config),
        coverage=coverage_of(adapter) if adapter.layers else None,
        parameters=adapter.num_parameters(),
        base_parameters=base.numbers,
        dtype=", ".join(part for part in (_float_dtype(trainer.bare), base.words()) if part),
        base_bytes=base.nbytes,
        quantize=None if config.quantize is None else config.quantize.name,
        path=trainer.path.name,
        train_rows=len(prepared),
        eval_rows=len(held.examples) if held else 0,
        data=[*prepared.report.lines(), f"loss on {task.learns(config)}"],
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        batch_size=options.batch_size * options.gradient_accumulation * world,
        learning_rate=options.learning_rate,
        seed=options.seed,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        versions=versions,
        base_revision=getattr(trainer.bare.config, "_commit_hash", None),
        before=before,
        after=after,
        findings=trainer.findings,
        stopped=trainer.health.stopped,
        samples=_samples(after.answers if after else (), config.evaluate.samples),
        checkpoint=Path(str(trainer.state.best_model_checkpoint)).name if options.keep_best else None,
        folder=options.output,
    )


def _shown_prompt(tokenizer: Any, example: Any) -> str:
    """What the first answer of an example follows, as text; of another task the whole text; empty where all is learned."""
    if isinstance(example, LabelledExample | Encoded):
        return str(tokenizer.decode(example.input_ids, skip_special_tokens=True))
    length = prompt_length(example.labels)
    return str(tokenizer.decode(example.input_ids[:length])) if length > 1 else ""


def _samples(answers: Sequence[Answer], count: int) -> list[Answer]:
    """A few answers: one that is wrong among them, if there is any, since a page of right ones says little."""
    wrong = [answer for answer in answers if not answer.right][: min(1, count)]
    right = [answer for answer in answers if answer.right][: count - len(wrong)]
    return [*right, *wrong]


def _version(package: str) -> str | None:
    """A package's version; None where it is not installed (peft is optional)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
