"""`lorakit prune`: an adapter without the layers or ranks that do little."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.outcome import on_base, told, unlike
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
            batches = None if data is None else loss_batches(given.tokenizer, data, rows)
            report = prune_adapter(given.adapters[0], keep=share, what=what, by=by, batches=batches)
            record = {"from": str(adapter), "keep": share, "what": what, "by": by, "dropped": list(report.dropped)}
            given.save(report.made, output, {"pruned": {**record, **report.made.record()}})
        else:
            report = prune_folder(adapter, output, keep=share, what=what)
    gone = f"{len(report.dropped)} layers left out by {by}" if report.dropped else f"no layer left out whole, by {by}"
    out.print(told(output, report.made, gone), markup=False)
    if report.loss is not None:
        out.print(f"loss on {rows} rows: {report.loss[0]:.4f} before, {report.loss[1]:.4f} after", markup=False)


def loss_batches(tokenizer: Any, data: str, rows: int, size: int = 8) -> list[dict[str, Any]]:
    """Rows as batches with labels, padded on the right."""
    import torch

    from lorakit.train.data import load_splits, prepare
    from lorakit.train.options import DataOptions

    options = DataOptions(train=data, limit=rows)
    found, _ = load_splits(options)
    examples = prepare(found, tokenizer, options).examples
    batches = []
    for start in range(0, len(examples), size):
        chosen = examples[start : start + size]
        width = max(len(example.input_ids) for example in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, example in enumerate(chosen):
            count = len(example.input_ids)
            ids[row, :count], mask[row, :count] = torch.tensor(example.input_ids), 1
            labels[row, :count] = torch.tensor(example.labels)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


__all__ = ["HELP", "loss_batches", "prune"]
