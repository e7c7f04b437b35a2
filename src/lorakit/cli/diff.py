"""`lorakit diff`: two adapters side by side, layer by layer."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.arguments import Adapter, Base, Json
from lorakit.cli.outcome import on_base
from lorakit.cli.screen import out
from lorakit.cli.tables import table

if TYPE_CHECKING:
    from lorakit.algebra.comparison import Angles

HELP = "Compare two adapters: norms, cosine and angles between their subspaces, per layer."


def diff(
    one: Adapter,
    other: Adapter,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compare only this many leading singular directions; by default all.")
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Compare, and print a table."""
    from lorakit.algebra.comparison import diff as compare

    with on_base("diff", [one, other], base) as given:
        found = compare(*given.adapters, rank=rank)
    if as_json:
        print(json.dumps({**asdict(found), "labels": [str(one), str(other)]}, indent=2))
        return
    rows = [
        (
            place,
            *(f"{value:.4g}" for value in (*row.norms, row.distance)),
            f"{row.cosine:+.3f}",
            _angles(row.columns),
            _angles(row.rows),
        )
        for place, row in found.layers.items()
    ]
    headings = (
        "first ‖ΔW‖",
        "second ‖ΔW‖",
        "distance",
        "cosine",
        "outputs: angles, overlap",
        "inputs: angles, overlap",
    )
    out.print(table("layer", *headings, rows=rows))
    for label, places in zip((one, other), found.alone, strict=True):
        if places:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            out.print(f"only {label} changes {places[0]}{more}", markup=False)
    out.print(
        f"overall: ‖ΔW‖ {found.norms[0]:.4g} and {found.norms[1]:.4g}, distance {found.distance:.4g}, "
        f"cosine {found.cosine:+.3f}",
        markup=False,
    )


def _angles(angles: Angles | None) -> str:
    if angles is None:
        return "-"
    least, largest = f"{angles.least:.0f}°", f"{angles.largest:.0f}°"
    return f"{least if least == largest else f'{least} to {largest}'}, {angles.overlap:.0%}"
