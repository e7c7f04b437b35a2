"""`lorakit methods`: every method, its formula, and what it costs on a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from lorakit.cli.screen import out

HELP = "List every method: formula, parameters for a model, memory, whether it can be served with others, paper."


def methods(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Count for this model's linear layers; else for one 576 → 1536 layer."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """Print the table."""
    from rich.markup import escape
    from rich.table import Table

    from lorakit.core.delta import Shape
    from lorakit.edits.anatomy import anatomy_of
    from lorakit.insight.catalogue import SAMPLE, catalogue, edits_catalogue, matrices

    if model is None:
        shapes, what, anatomy, whole = [Shape(1536, 576)], "one 576 → 1536 layer", SAMPLE, "30 blocks of width 576"
    else:
        from lorakit.models.loading import load_model

        loaded = load_model(model)[0]
        shapes, whole, anatomy = list(matrices(loaded).values()), model, anatomy_of(loaded)
        what = f"the {len(shapes)} linear layers of {model}"
    entries, edits = catalogue(shapes), edits_catalogue(anatomy)
    if as_json:
        out.print_json(json.dumps([asdict(entry) for entry in entries] + [asdict(edit) for edit in edits]))
        return
    table = Table(title=f"Methods at their defaults, on {what}", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "formula", "parameters", "training", "merges", "served together", "PEFT", "paper"):
        table.add_column(heading, justify="right" if heading in ("parameters", "training") else "left")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.formula,
            f"{entry.parameters:,}" if entry.parameters is not None else "does not fit",
            _size(entry.training_bytes),
            "yes",
            "yes" if entry.form else "no",
            entry.peft or "no",
            entry.paper,
        )
    out.print(table)
    table = Table(title=f"Edits at their defaults, on {whole}", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "formula", "parameters", "training", "starts as the base", "PEFT", "paper"):
        table.add_column(heading, justify="right" if heading in ("parameters", "training") else "left")
    for edit in edits:
        table.add_row(
            edit.name,
            escape(edit.formula),
            f"{edit.parameters:,}" if edit.parameters is not None else "does not fit",
            _size(edit.training_bytes),
            "yes" if edit.identity else "no",
            edit.peft or "no",
            edit.paper,
        )
    out.print(table)
    for name, reason in [(one.name, one.reason) for one in entries] + [(one.name, one.reason) for one in edits]:
        if reason:
            out.print(f"{name}: {reason}", markup=False)


def _size(count: int | None) -> str:
    """Bytes for a person."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count = round(count / 1000)
    return f"{count} GB"
