"""`lorakit train`: one run from a YAML file and flags, one flag for every option of the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import err, out, show_log

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lorakit.train.run import TrainResult

HELP = "Train an adapter: lorakit train CONFIG.yaml [--rank 8] [--train.max-steps 20] [--set NAME=VALUE] ..."

# The flags are the options of the run, known only when they are asked for: they are taken as they stand.
CONTEXT: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [--OPTION VALUE]...")] = None,
) -> None:
    """Carry out the run that the arguments describe."""
    arguments = arguments or []
    if not arguments or {"--help", "-h"} & set(arguments):
        out.print(usage())
        raise typer.Exit(0 if arguments else 2)
    file, overrides = split_arguments(arguments)
    show_log(err)
    from lorakit.train.config.run import load_config
    from lorakit.train.run import end_processes
    from lorakit.train.run import train as run

    result = run(load_config(file, overrides), console=err)
    show_result(result)
    end_processes()
    if result.stopped is not None:
        raise typer.Exit(1)


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The configuration file, if the first argument is one, and the flags."""
    first = arguments[0]
    if first.startswith("-") or "=" in first:
        return None, arguments
    return first, arguments[1:]


def show_result(result: TrainResult) -> None:
    """The table of before and after, sample answers, and where everything is."""
    from lorakit.train.evaluate import tabulate

    measured = {name: one for name, one in (("before", result.before), ("after", result.after)) if one is not None}
    if measured:
        out.print(tabulate(measured, title=f"{result.record.name} on {result.record.eval_rows:,} held-out rows"))
    for answer in result.record.samples:
        mark = "right" if answer.right else f"expected {answer.expected}"
        out.print(f"{answer.prompt}\n  → {answer.given} ({mark})", markup=False)
    if result.stopped is not None:
        err.print(f"stopped early: {result.stopped}", style="bold red", markup=False)
    picture = result.folder / "curves.png"
    out.print(f"adapter: {result.folder}" + (f", curves: {picture}" if picture.exists() else ""), markup=False)


def usage() -> RenderableType:
    """The help: how to call it, and every option with its default and one line."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lorakit.train.config.run import config_fields

    parts: list[RenderableType] = [
        Text(f"Usage: {Path(sys.argv[0]).name} train [CONFIG.yaml] [--OPTION VALUE]...\n"),
        Text(
            "A run is described by a YAML file, by flags, or by both; flags win. Every option of the file "
            "is a flag of the same dotted name, - and _ alike: --train.max-steps 20, --rank=8, --set "
            "rank=8, --no-data.completion-only-loss.\n"
        ),
    ]
    sections: dict[str, list[Any]] = {}
    for option in config_fields():
        sections.setdefault(option.section, []).append(option)
    titles = {"": "the run", "method": "options of methods"}
    for section, options in sections.items():
        table = Table(title=titles.get(section, section), title_justify="left", title_style="bold", box=None)
        table.add_column("flag", no_wrap=True, header_style="dim")
        table.add_column("default", overflow="fold", header_style="dim")
        table.add_column("", ratio=1)
        for option in options:
            default = "required" if option.is_required else option.default_text
            doc = option.doc + (f" [{' | '.join(option.choices)}]" if option.choices else "")
            table.add_row(Text(option.flag), Text(default), Text(doc))
        parts += [table, Text("")]
    return Group(*parts)
