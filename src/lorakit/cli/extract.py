"""`lorakit extract`: a LoRA out of a fine-tuned model and its base, without loading either."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lorakit.cli.arguments import Energy, Output, Overwrite, Rank
from lorakit.cli.outcome import told
from lorakit.cli.screen import err, out
from lorakit.errors import plural

HELP = "Extract a LoRA from a fine-tuned model and its base, reading both tensor by tensor."


def extract(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the base model.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="Folder of the fine-tuned model.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Layers to extract, by name ending; repeat for several. Default: all linear."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave out; repeat for several.")] = None,
    rest: Annotated[
        Literal["save", "report", "refuse"],
        typer.Option(help="What to do with other tensors that differ (norms, biases, embeddings)."),
    ] = "save",
    overwrite: Overwrite = False,
) -> None:
    """Extract, and print the error."""
    from rich.progress import Progress

    from lorakit.algebra.extraction import extract as extract_adapter
    from lorakit.cli.outcome import claim_adapter

    claim_adapter("extract", output, overwrite)

    with Progress(console=err, transient=True) as shown:
        task = shown.add_task("extract", total=None)
        found = extract_adapter(
            base,
            tuned,
            rank=rank,
            energy=energy,
            target_modules=target or "all-linear",
            exclude_modules=exclude or None,
            rest=rest,
            output=output,
            progress=lambda done, count, layer: shown.update(task, completed=done, total=count, description=layer),
        )
    out.print(told(output, found.made, f"from {tuned}"), markup=False)
    if found.unchanged:
        same = plural(len(found.unchanged), "layer")
        out.print(f"not adapted: {same} equal to the base, the first {found.unchanged[0]}", markup=False)
    for words, tensors in (("saved whole", found.saved), ("LEFT OUT", found.left)):
        if tensors:
            most = max(tensors, key=lambda key: tensors[key])
            differing = plural(len(tensors), "other tensor")
            out.print(f"{words}: {differing}, changed by at most {tensors[most]:.2%} ({most})", markup=False)
