"""`lorakit combine`: several adapters as one, by sum, cut, TIES or DARE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.outcome import batches_of, numbers, on_base, pattern_numbers, told, unlike
from lorakit.cli.screen import out

HELP = "Make one adapter of several: linear, cat, svd, ties, dare-linear, dare-ties, magnitude-prune, regmean, fisher."


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="The adapter folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    weights: Annotated[
        str | None, typer.Option(help="One number per adapter, such as 0.7,0.3; equal shares of 1 by default.")
    ] = None,
    how: Annotated[str, typer.Option(help="The recipe; `lorakit combine --recipes` says what each does.")] = "linear",
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the result to this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of each layer's squared singular values to keep.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of entries that ties, dare and magnitude-prune keep (0.2).")
    ] = None,
    factor: Annotated[float, typer.Option(help="Times everything (the λ of TIES and task arithmetic).")] = 1.0,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Other weights for layers that end so: --layer 'q_proj=1,0'; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the entries that DARE keeps.")] = 0,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Rows of one adapter's own data, for regmean and fisher; once for each adapter, in order."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of each one's rows.")] = 64,
    base: Annotated[
        str | None,
        typer.Option(help="The base model, for data and for methods other than LoRA; by default the one in the files."),
    ] = None,
    recipes: Annotated[
        bool,
        typer.Option(
            "--recipes", is_eager=True, callback=lambda asked: _recipes(asked), help="Say what each recipe does."
        ),
    ] = False,
) -> None:
    """Combine, and say what it cost."""
    from lorakit.algebra.combining import combine as combine_adapters

    unlike("combine", output, adapters)
    options: dict[str, Any] = {
        "weights": numbers(weights, "--weights") if weights is not None else None,
        "how": how,
        "rank": rank,
        "energy": energy,
        "density": density,
        "factor": factor,
        "layer_weights": pattern_numbers(layer or [], "--layer"),
        "seed": seed,
    }
    with on_base("combine", base, adapters, always=bool(data)) as given:
        if given.on_model:
            if data:
                size = 1 if how == "fisher" else 8  # there each batch counts as one example
                options["batches"] = [batches_of(given.tokenizer, own, rows, size) for own in data]
            report = combine_adapters(given.adapters, **options)
            given.save(
                report, output, {"combined": {"from": [str(a) for a in adapters], "how": how, **report.record()}}
            )
        else:
            report = combine_adapters(adapters, output=output, **options)
    out.print(told(output, report, f"{len(adapters)} adapters by {how}"), markup=False)


def _recipes(asked: bool) -> None:
    if not asked:
        return
    from lorakit.algebra.combining import RECIPES

    for name, recipe in RECIPES.items():
        out.print(f"{name:16} {recipe.text}", markup=False)
    raise typer.Exit
