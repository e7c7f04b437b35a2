"""`lorakit eval`: measure an adapter against its base on the rows of a run, or on others."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.arguments import adapter_path
from lorakit.cli.screen import err, log_to, out, show_log

HELP = (
    "Measure an adapter against its base. WHAT is an adapter folder that lorakit trained (measured on the "
    "rows of its own configuration), or a CONFIG.yaml together with --adapter. Options of the run may be "
    "given as for train."
)

log = logging.getLogger("lorakit")

CONTEXT: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def evaluate(
    context: typer.Context,
    what: Annotated[
        Path, typer.Argument(parser=adapter_path, help="An adapter with its train.yaml, or a configuration.")
    ],
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", "-a", parser=adapter_path, help="An adapter; give several to compare."),
    ] = None,
    base: Annotated[bool, typer.Option(help="Measure the base model too.")] = True,
    samples: Annotated[int, typer.Option(min=0, help="How many answers to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead.")] = False,
) -> None:
    """Measure, and print a table with a column for the base and for each adapter."""
    log_to(err)
    from lorakit.errors import LorakitError, nearest
    from lorakit.train.config.run import TrainConfig, load_config

    file, adapters = what, list(adapter or ())
    if what.is_dir():
        file, adapters = what / "train.yaml", [what, *adapters]
        if not file.exists():
            raise LorakitError(
                f"eval: {what} has no train.yaml, which would name the rows to measure on; "
                f"use lorakit eval CONFIG.yaml --adapter {what}"
            )
    flags = [name for one in context.command.params for name in one.opts]
    for word in context.args:
        near = nearest(word.partition("=")[0], flags, cutoff=0.75) if word.startswith("--") else []
        if near:
            raise LorakitError(f'eval: there is no option {word}; did you mean "{near[0]}"?')
    config = load_config(file, context.args)  # first, so that a mistake in it is told before transformers is imported
    show_log(err)
    import lorakit as lk
    from lorakit.cli.conversation import check_adapters
    from lorakit.files.prompt import Prompt, Prompter
    from lorakit.files.vocabulary import make_room
    from lorakit.models.loading import load_tokenizer
    from lorakit.train.check import readable, with_task
    from lorakit.train.data.formats import with_prompt
    from lorakit.train.data.reading import load_splits
    from lorakit.train.evaluate import Evaluation, EvaluationSet, tabulate
    from lorakit.train.run import evaluation_set, examine, load_for
    from lorakit.train.tasks import check_columns, task_of

    config = with_task(config)
    task = task_of(config)
    train_rows, rows = load_splits(config.data)
    if rows is None:
        raise LorakitError(
            f"eval: {file} names no rows to evaluate on; give --data.evaluation FILE or --data.evaluation-size N"
        )
    # what is wrong with rows or adapters does not wait for the weights
    check_columns(task, rows, config)
    classes = task.classes(train_rows, config)
    if (place := readable(config.model)) is not None:
        task.prepare(rows, load_tokenizer(place, {}), config, classes)
    check_adapters(adapters)
    model, tokenizer = load_for(config, classes)
    make_room(model, adapters)
    loaded = [lk.load(model, folder, active=False) for folder in adapters]
    path = task.path(model, config)

    def ask(prompt: Prompt | None) -> tuple[Any, EvaluationSet, TrainConfig]:
        """The rows in the form in which an adapter was trained: its tokenizer, its examples, its configuration."""
        own = config.replace(data=with_prompt(config.data, prompt, rows))
        if own != config and prompt is not None:
            log.info("asked by %s", prompt.place)
        reader = tokenizer if prompt is None else Prompter(tokenizer, prompt).tokenizer
        return reader, evaluation_set(rows, reader, own, classes), own

    # The base is asked as the adapter that it is compared with; without one, as the configuration says.
    asked = {one.name: ask(one.prompt) for one in loaded}
    first = next(iter(asked.values())) if what.is_dir() else ask(None) if base or not asked else None
    first = first or next(iter(asked.values()))
    measured: dict[str, Evaluation] = {}
    for name in [*([None] if base else []), *asked]:
        reader, held, own = first if name is None else asked[name]
        with lk.use(model, name) if loaded else contextlib.nullcontext():
            measured[name or "base"] = examine(model, reader, held, own, path)
    if as_json:
        numbers = {name: {"rows": one.rows, **one.numbers()} for name, one in measured.items()}
        print(json.dumps(numbers, indent=2))
        return
    out.print(tabulate(measured, title=f"{config.model} on {len(first[1].examples):,} rows"))
    last = list(measured.values())[-1] if measured else None
    for answer in last.answers[:samples] if last else ():
        mark = "right" if answer.right else f"expected {answer.expected}"
        out.print(f"{answer.prompt}\n  → {answer.given} ({mark})", markup=False)
