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
    from rich.table import Table

    from lorakit.catalogue import catalogue, matrices
    from lorakit.delta import Shape

    if model is None:
        shapes, what = [Shape(1536, 576)], "one 576 → 1536 layer"
    else:
        from lorakit.train.models import load_model

        shapes = list(matrices(load_model(model)[0]).values())
        what = f"the {len(shapes)} linear layers of {model}"
    entries = catalogue(shapes)
    if as_json:
        out.print_json(json.dumps([asdict(entry) for entry in entries]))
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
    for entry in entries:
        if entry.reason:
            out.print(f"{entry.name}: {entry.reason}", markup=False)


def _size(count: int | None) -> str:
    """Bytes for a person."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count = round(count / 1000)
    return f"{count} GB"
