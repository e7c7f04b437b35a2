"""`lorakit convert`: an adapter in another tool's format, and what the format does not keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.screen import err, out

HELP = "Write an adapter in another tool's format: peft, kohya, lycoris, diffusers, loralib, gguf, mlx."


def convert(
    source: Annotated[Path, typer.Argument(help="The adapter: a .safetensors or .gguf file, or a folder.")],
    to: Annotated[str, typer.Option("--to", help="The format to write.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file or folder to write; without it, only what would be done."),
    ] = None,
    origin: Annotated[
        str | None, typer.Option("--from", help="The format to read; found from the file itself by default.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model or pipeline (its configuration is enough): for names, for a check of shapes, for GGUF."
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The scale's numerator, where the file does not say it (loralib).")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Which part of a pipeline the adapter is for: unet, text_encoder, …")
    ] = None,
) -> None:
    """Convert, after saying what the target does not hold."""
    from lorakit.conversion import FORMATS
    from lorakit.conversion import convert as convert_adapter
    from lorakit.errors import unknown

    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    err.print(f"{to}: {FORMATS[to].limits} Scale: {FORMATS[to].scale}.", markup=False, highlight=False)
    done = convert_adapter(
        source,
        output,
        to,
        origin=origin,
        base=base,
        alpha=alpha,
        component=component,
        tell=lambda note: err.print(note, markup=False),
    )
    layers = list(done.description.layers())
    parts = [part for part in done.description.components if part]
    where = f" ({', '.join(parts)})" if parts else ""
    verb = f"{output}: " if output is not None else "would be written: "
    out.print(f"{verb}{len(layers)} layers{where} from {done.source} to {done.target}", markup=False)
