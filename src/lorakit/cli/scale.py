"""`lorakit scale`: an adapter with more or less of its effect."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli.arguments import Adapter, Base, Output, Overwrite, Rank
from lorakit.cli.outcome import on_base

HELP = "Scale an adapter's effect: 0.5 halves it, -1 reverses it."


def scale(
    adapter: Adapter,
    factor: Annotated[float, typer.Argument(metavar="FACTOR", help="Factor.")],
    output: Output,
    rank: Rank = None,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Scale, and print the error."""
    from lorakit.algebra.combining import scale as scaled

    with on_base("scale", [adapter], base, output, overwrite) as given:
        made = scaled(given.adapters[0], factor, rank=rank, output=given.output)
        given.finish(made, f"{factor:g} times {adapter}")
