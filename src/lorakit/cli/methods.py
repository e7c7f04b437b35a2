"""`lorakit methods`: every method with its formula and what it costs on a model, or one method whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import out, two_columns, width

if TYPE_CHECKING:
    from lorakit.insight.catalogue import Entry
    from lorakit.train.config.fields import ConfigField

HELP = (
    "List every method: formula, parameters for a model, memory, whether it can be served with others, paper. "
    "With a NAME: everything about that method, with its options."
)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, to be shown whole.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Count for this model's linear layers; else for one 576 → 1536 layer."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """Print the table, or one method."""
    from lorakit.core.delta import Shape
    from lorakit.edits.anatomy import anatomy_of
    from lorakit.files.table import method_named
    from lorakit.insight.catalogue import SAMPLE, catalogue, edits_catalogue, entry_of, matrices
    from lorakit.train.config.fields import choice_fields

    spec = method_named(name) if name is not None else None
    if model is None:
        shapes, what, anatomy, whole = [Shape(1536, 576)], "one 576 → 1536 layer", SAMPLE, "30 blocks of width 576"
    else:
        from lorakit.models.loading import load_model

        loaded = load_model(model)[0]
        shapes, whole, anatomy = list(matrices(loaded).values()), model, anatomy_of(loaded)
        what = f"the {len(shapes)} linear layers of {model}"
    if spec is not None:
        entry, options = entry_of(spec, shapes, anatomy), list(choice_fields("method", spec.name))
        if as_json:
            out.print_json(
                json.dumps({**asdict(entry), "peft": _peft(entry), "options": [option.as_data() for option in options]})
            )
        else:
            _show(entry, options, whole if hasattr(entry, "flat") else what)
        return
    entries, edits = catalogue(shapes), edits_catalogue(anatomy)
    if as_json:
        out.print_json(json.dumps([{**asdict(one), "peft": _peft(one)} for one in (*entries, *edits)]))
        return
    _table(
        f"Methods at their defaults, on {what}",
        ("merges", "served together"),
        [(entry, ("yes", "yes" if entry.form else "no")) for entry in entries],
    )
    _table(
        f"Edits at their defaults, on {whole}",
        ("starts as the base",),
        [(edit, ("yes" if edit.identity else "no",)) for edit in edits],
    )
    for entry in [*entries, *edits]:
        if entry.reason:
            out.print(f"{entry.name}: {entry.reason}", markup=False)


def _table(title: str, headings: tuple[str, ...], rows: list[tuple[Any, tuple[str, ...]]]) -> None:
    """One line per entry; `headings` are those between what it takes and PEFT's name."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "formula", "parameters", "training", *headings, "PEFT", "paper"):
        table.add_column(heading, justify="right" if heading in ("parameters", "training") else "left")
    for entry, answers in rows:
        formula, size = escape(entry.formula), _size(entry.training_bytes)
        table.add_row(entry.name, formula, _count(entry), size, *answers, _peft(entry) or "no", entry.paper)
    out.print(table)


def _show(entry: Entry, options: list[ConfigField], what: str) -> None:
    """One method: what it is and when to take it, then its options."""
    rows = [
        ("formula", entry.formula),
        ("paper", entry.paper),
        ("use", entry.use),
        ("limits", entry.limits),
        ("before training", "changes nothing" if entry.identity else "already changes the base"),
        ("parameters", f"{_count(entry)} on {what}, {_size(entry.training_bytes)} of memory to train"),
        ("PEFT", _peft(entry) or "has no such method"),
        ("note", entry.reason),
    ]
    if entry.parameters is None:
        rows = [row for row in rows if row[0] != "parameters"]
    columns = width()
    out.print(f"{entry.name}: {entry.title}", style="bold", markup=False)
    out.print(two_columns([(heading, text) for heading, text in rows if text], columns), markup=False)
    out.print("\nOptions, as keys of a run's file and as flags of `lorakit train`", style="bold", markup=False)
    out.print(
        two_columns([(option.flag, option.told(whole=True)) for option in options], columns) or "  none", markup=False
    )


def _peft(entry: Entry) -> str | None:
    """PEFT's name of the same."""
    from lorakit.files.formats import format_of

    return format_of(entry.name).peft


def _count(entry: Entry) -> str:
    return f"{entry.parameters:,}" if entry.parameters is not None else "does not fit"


def _size(count: int | None) -> str:
    """Bytes for a person."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count = round(count / 1000)
    return f"{count} GB"
