"""`lorakit train`: one run from a YAML file and flags, one flag for every option of the file."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import err, log_to, out, show_log, two_columns, width

if TYPE_CHECKING:
    from rich.text import Text

    from lorakit.train.check import Checked
    from lorakit.train.config.options import TrainConfig
    from lorakit.train.run import TrainResult

HELP = "Train an adapter: lorakit train CONFIG.yaml [--rank 8] [--train.max-steps 20] [--set NAME=VALUE] ..."

ABOUT = (
    "A run is described by a YAML file, by flags, or by both; flags win. Every option below is a key of the file and a "
    "flag, - and _ alike: --train.max-steps 20, --train.max_steps=20, --set train.max_steps=20, "
    "--no-data.completion-only-loss."
)
SEE_ALSO = (
    ("lorakit train --method dora --help", "the options of a method too (rank, alpha, dropout, ...)"),
    ("lorakit methods [dora]", "all methods, or all about one"),
    (
        "lorakit train CONFIG.yaml --check",
        "check everything but the weights; show the first rows as the model sees them",
    ),
    ("lorakit train --schema", "the JSON schema of the file, for editors"),
)

# The flags are the options of the run, known only when they are asked for: they are taken as they stand.
CONTEXT: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [--OPTION VALUE]...")] = None,
) -> None:
    """Carry out the run that the arguments describe."""
    arguments = arguments or []
    if "--schema" in arguments:
        from lorakit.train.config.schema import json_schema

        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    if not arguments or {"--help", "-h"} & set(arguments):
        out.print(usage([word for word in arguments if word not in ("--help", "-h")]))
        raise typer.Exit(0 if arguments else 2)
    only_check = "--check" in arguments
    file, overrides = split_arguments([word for word in arguments if word != "--check"])
    log_to(err)
    from lorakit.train.config.run import load_config

    config = load_config(file, overrides)  # first, so that a mistake in it is told before transformers is imported
    show_log(err)
    if only_check:
        from lorakit.train import run_checkpoint
        from lorakit.train.check import check, lines

        with run_checkpoint.claimed(Path(config.train.output), config.train.resume, config.overwrite):
            checked = check(config)
            for line in [*lines(checked, config), *memory_lines(checked, config)]:
                out.print(line, markup=False)
        return
    from lorakit.train.run import end_processes
    from lorakit.train.run import train as run

    result = run(config, console=err)
    if not int(os.environ.get("RANK", "0")):  # one process of several says it
        show_result(result)
    end_processes()
    if result.stopped is not None:
        raise typer.Exit(1)


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The configuration file, if the first argument is one, and the flags."""
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        return None, arguments
    return arguments[0], arguments[1:]


def show_result(result: TrainResult) -> None:
    """The table of before and after, sample answers, and where everything is."""
    from lorakit.train.evaluate import tabulate

    if measured := result.record.measured:
        out.print(tabulate(measured, title=f"{result.record.name} on {result.record.eval_rows:,} held-out rows"))
    for answer in result.record.samples:
        mark = "right" if answer.right else f"expected {answer.expected}"
        out.print(f"{answer.prompt}\n  → {answer.given} ({mark})", markup=False)
    if result.stopped is not None:
        err.print(f"stopped early: {result.stopped}", style="bold red", markup=False)
    picture = result.folder / "curves.png"
    out.print(f"adapter: {result.folder}" + (f", curves: {picture}" if picture.exists() else ""), markup=False)


def usage(arguments: list[str]) -> Text:
    """The help: how to call it, every option of a run, and those of the method that the file or the flags name."""
    from rich.text import Text

    from lorakit.train.config.fields import ConfigField, choice_fields, run_fields
    from lorakit.train.config.run import chosen_method

    columns = width()
    text = Text(f"Usage: {Path(sys.argv[0]).name} train [CONFIG.yaml] [--OPTION VALUE]...\n\n")
    text.append(textwrap.fill(ABOUT, columns) + "\n\n" + two_columns(SEE_ALSO, columns) + "\n")
    groups: dict[str, list[ConfigField]] = {}
    for option in run_fields():
        groups.setdefault(option.heading, []).append(option)
    method = chosen_method(*split_arguments(arguments)) if arguments else ""
    if method:
        groups[f"Options of the method {method}"] = list(choice_fields("method", method))
    for heading, options in groups.items():
        text.append(f"\n{heading}\n", style="bold")
        text.append(two_columns([(option.flag, option.told()) for option in options], columns) + "\n")
    return text


def memory_lines(checked: Checked, config: TrainConfig) -> list[str]:
    """What a run will take in memory, counted from shapes; what cannot be counted is said."""
    from lorakit.core.delta import Method
    from lorakit.errors import LorakitError
    from lorakit.insight.plan import gigabytes, plan
    from lorakit.models.device import resolve_device
    from lorakit.models.loading import resolve_dtype
    from lorakit.train.check import state_bytes, with_task

    if checked.adapter is None or checked.prepared is None:
        return []
    trained = checked.adapter.num_parameters()
    state = round(trained * state_bytes(config.train))
    known = {"adapter": 4 * trained, "gradients": 4 * trained, f"state of {config.train.optimizer}": state}
    told = "memory of the base and the activations: not counted"
    method = checked.adapter.method  # which --from may have brought
    if with_task(config).task == "causal-lm" and isinstance(method, Method):
        report, quantize = checked.prepared.report, config.quantize
        try:
            one = plan(
                checked.adapter.model.config,
                "lora" if quantize is None else "qlora",
                method=method,
                batch=config.train.batch_size,
                length=report.longest,
                dtype=resolve_dtype(config.train.precision, resolve_device(config.train.device))[0],
                form="nf4" if quantize is None else quantize.name,
                recompute=config.train.memory == "small",
            )
        except LorakitError as problem:
            told += f" ({problem})"
        else:
            known = {"base": one.base, **known, "activations": one.activations}
            told = (
                f"activations: {config.train.batch_size} × {report.longest:,} tokens, the longest example, in every row"
            )
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in known.items())
    return [f"memory: {gigabytes(sum(known.values()))}: {parts}", told]
