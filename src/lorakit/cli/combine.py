"""`lorakit combine`: several adapters as one, by sum, cut, TIES, DARE or what data say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorakit.algebra.recipes import RECIPES, Combination
from lorakit.cli.arguments import Base, Output, Overwrite, Rows, adapter_path
from lorakit.cli.flags import flags
from lorakit.cli.outcome import on_base
from lorakit.cli.screen import out
from lorakit.errors import LorakitError, plural

HELP = f"Combine several adapters into one: {', '.join(RECIPES)}."


def _recipes(asked: bool) -> None:
    if asked:
        for name, recipe in RECIPES.items():
            out.print(f"{name:16} {recipe.text}", markup=False)
        raise typer.Exit


@flags(layer_weights="--layer")
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTERS", parser=adapter_path, help="Folders or hub names.")
    ],
    output: Output,
    asked: Combination,
    data: Annotated[
        list[str] | None,
        typer.Option(help="One adapter's own rows, for regmean and fisher; repeat it for each adapter, in order."),
    ] = None,
    rows: Rows = 64,
    base: Base = None,
    recipes: Annotated[
        bool, typer.Option("--recipes", is_eager=True, callback=_recipes, help="Describe the recipes, and exit.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Combine, and print the error."""
    from lorakit.algebra.combining import combine as combine_adapters

    if data and len(data) != len(adapters):
        raise LorakitError(
            f"combine: --data was given {plural(len(data), 'time')}, for {plural(len(adapters), 'adapter')}; give it once for "
            "each, in order."
        )
    with on_base("combine", adapters, base, output, overwrite, always=bool(data)) as given:
        size = 1 if asked.how == "fisher" else 8  # there each batch counts as one example
        batches = [given.batches(own, rows, size) for own in data] if data else None
        made = combine_adapters(given.adapters, batches=batches, output=given.output, **asdict(asked))
        given.finish(made, f"{plural(len(adapters), 'adapter')} combined by {asked.how}")
