"""`lorakit extract`: a LoRA out of a fine-tuned model and its base, without loading either."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.outcome import told
from lorakit.cli.screen import err, out

HELP = "Make a LoRA of the difference between a fine-tuned model and its base, tensor by tensor."


def extract(
    base: Annotated[Path, typer.Argument(help="The base model's folder: config.json and safetensors.")],
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned model's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter folder to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of every layer.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of each layer's squared singular values to keep.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Layers to make low-rank, by the ends of their names; may be repeated.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave out; may be repeated.")] = None,
    rest: Annotated[
        str, typer.Option(help="What else differs (norms, biases, embeddings): save it whole, report it, or refuse.")
    ] = "save",
) -> None:
    """Extract, and say what it cost."""
    from rich.progress import Progress

    from lorakit.algebra.extraction import extract as extract_adapter

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
        out.print(
            f"{len(found.unchanged)} layers are as in the base and not adapted, the first {found.unchanged[0]}",
            markup=False,
        )
    for words, tensors in (("kept whole", found.saved), ("LEFT OUT", found.left)):
        if tensors:
            most = max(tensors, key=lambda key: tensors[key])
            out.print(
                f"{words}: {len(tensors)} other tensors that differ, by at most {tensors[most]:.2%} ({most})",
                markup=False,
            )
