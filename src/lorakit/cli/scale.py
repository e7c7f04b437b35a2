"""`lorakit scale`: an adapter with more or less of its effect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.outcome import on_base, told, unlike
from lorakit.cli.screen import out

HELP = "Write an adapter that adds a multiple of what another adds: 0.5 halves it, -1 turns it round."


def scale(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder.")],
    factor: Annotated[float, typer.Argument(help="The multiple.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the result to this rank.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, for methods other than LoRA; by default the one in the file.")
    ] = None,
) -> None:
    """Scale, and say what it cost."""
    from lorakit.algebra.combining import scale as scaled

    unlike("scale", output, [adapter])
    with on_base("scale", base, [adapter]) as given:
        if given.on_model:
            report = scaled(given.adapters[0], factor, rank=rank)
            given.save(report, output, {"scaled": {"from": str(adapter), "factor": factor, **report.record()}})
        else:
            report = scaled(adapter, factor, rank=rank, output=output)
    out.print(told(output, report, f"{factor:g} times {adapter}"), markup=False)
