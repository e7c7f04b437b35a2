"""`lorakit prune`: an adapter without the layers or ranks that do little."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorakit.cli.arguments import Adapter, Base, Output, Overwrite, Rows
from lorakit.cli.outcome import on_base
from lorakit.cli.screen import out
from lorakit.errors import plural

HELP = "Remove the layers or ranks of an adapter that matter least, by their norm or by the loss on data."


def prune(
    adapter: Adapter,
    output: Output,
    keep: Annotated[
        float, typer.Option(help="Share to keep, such as 0.5; 1 and above is a number of layers or ranks.")
    ],
    what: Annotated[Literal["layers", "ranks"], typer.Option(help="What to remove.")] = "layers",
    data: Annotated[
        str | None, typer.Option(help="Rows to measure the loss on, as for training; by default the norm decides.")
    ] = None,
    rows: Rows = 64,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Prune, and print the error."""
    from lorakit.algebra.pruning import prune as prune_adapter

    by = "norm" if data is None else "loss"
    with on_base("prune", [adapter], base, output, overwrite, always=data is not None) as given:
        found = prune_adapter(
            given.adapters[0],
            keep=int(keep) if keep >= 1 and keep.is_integer() else keep,
            what=what,
            by=by,
            batches=None if data is None else given.batches(data, rows),
            output=given.output,
        )
        given.finish(found.made, f"{plural(len(found.dropped), 'whole layer')} removed by {by}")
    if found.loss is not None:
        out.print(f"loss on {plural(rows, 'row')}: {found.loss[0]:.4f} -> {found.loss[1]:.4f}", markup=False)
