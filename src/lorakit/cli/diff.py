"""`lorakit diff`: two adapters side by side, layer by layer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.outcome import on_base
from lorakit.cli.screen import out

HELP = "Compare two adapters: norms, cosine and angles between their subspaces, per layer."


def diff(
    one: Annotated[Path, typer.Argument(help="An adapter folder.")],
    other: Annotated[Path, typer.Argument(help="Another for the same base.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compare the subspaces of so many largest directions; by default all.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, for methods other than LoRA; by default the one in the files.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Compare, and print a table."""
    from rich.table import Table

    from lorakit.algebra.comparison import Angles
    from lorakit.algebra.comparison import diff as compare

    with on_base("diff", base, [one, other]) as given:
        found = compare(*(given.adapters if given.on_model else (one, other)), rank=rank)
    if as_json:
        print(json.dumps({**asdict(found), "labels": [str(one), str(other)]}, indent=2))
        return

    def shown(angles: Angles | None) -> str:
        if angles is None:
            return "-"
        least, largest = f"{angles.least:.0f}°", f"{angles.largest:.0f}°"
        return f"{least if least == largest else f'{least} to {largest}'}, {angles.overlap:.0%}"

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold", min_width=24)
    for column in (
        "first ‖ΔW‖",
        "second ‖ΔW‖",
        "distance",
        "cosine",
        "writes: angles, overlap",
        "reads: angles, overlap",
    ):
        table.add_column(column, justify="right")
    for place, row in found.layers.items():
        table.add_row(
            place,
            *(f"{value:.4g}" for value in (*row.norms, row.distance)),
            f"{row.cosine:+.3f}",
            shown(row.columns),
            shown(row.rows),
        )
    out.print(table)
    for label, places in zip((one, other), found.alone, strict=True):
        if places:
            out.print(f"only {label} changes {places[0]}" + (f" and {len(places) - 1} more" if len(places) > 1 else ""))
    out.print(
        f"in all: ‖ΔW‖ {found.norms[0]:.4g} and {found.norms[1]:.4g}, distance {found.distance:.4g}, "
        f"cosine {found.cosine:+.3f}",
        markup=False,
    )
