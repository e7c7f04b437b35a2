"""`lorakit prune`: an adapter without the layers or ranks that do little."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.outcome import batches_of, on_base, told, unlike
from lorakit.cli.screen import out

HELP = "Leave out the layers or ranks of an adapter that do little, by their size or by the loss on data."


def prune(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    keep: Annotated[float, typer.Option(help="The share that stays, such as 0.5; a number from 1 on is a count.")],
    what: Annotated[str, typer.Option(help="layers or ranks.")] = "layers",
    data: Annotated[
        str | None, typer.Option(help="Rows to measure the loss on (as for training); without them size decides.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of the rows.")] = 64,
    base: Annotated[
        str | None,
        typer.Option(help="The base model, for data and for methods other than LoRA; by default the file's."),
    ] = None,
) -> None:
    """Prune, and say what it cost."""
    from lorakit.algebra.pruning import prune as prune_adapter
    from lorakit.algebra.pruning import prune_folder

    unlike("prune", output, [adapter])
    share: float | int = keep if keep < 1 else int(keep)
    by = "norm" if data is None else "loss"
    with on_base("prune", base, [adapter], always=data is not None) as given:
        if given.on_model:
            batches = None if data is None else batches_of(given.tokenizer, data, rows)
            report = prune_adapter(given.adapters[0], keep=share, what=what, by=by, batches=batches)
            record = {"from": str(adapter), "keep": share, "what": what, "by": by, "dropped": list(report.dropped)}
            given.save(report.made, output, {"pruned": {**record, **report.made.record()}})
        else:
            report = prune_folder(adapter, output, keep=share, what=what)
    gone = f"{len(report.dropped)} layers left out by {by}" if report.dropped else f"no layer left out whole, by {by}"
    out.print(told(output, report.made, gone), markup=False)
    if report.loss is not None:
        out.print(f"loss on {rows} rows: {report.loss[0]:.4f} before, {report.loss[1]:.4f} after", markup=False)
