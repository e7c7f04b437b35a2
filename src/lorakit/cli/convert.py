"""`lorakit convert`: an adapter in another tool's format, and what of it that format cannot keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.arguments import Overwrite, adapter_path
from lorakit.cli.screen import err, out
from lorakit.errors import plural

HELP = "Convert an adapter to another tool's format: peft, kohya, lycoris, diffusers, loralib, gguf, mlx."


def convert_names() -> tuple[str, ...]:
    """The files that a conversion writes into a folder."""
    from lorakit.conversion.content import MLX_TENSORS
    from lorakit.conversion.diffusers import DIFFUSERS
    from lorakit.conversion.names import COMPONENTS
    from lorakit.files.bundle import CONTENT
    from lorakit.files.prompt import TEMPLATE

    return (*CONTENT, TEMPLATE, MLX_TENSORS, DIFFUSERS.file, *COMPONENTS)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", parser=adapter_path, help="Adapter: .safetensors, .gguf, a folder, a hub name."
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="Format to write.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File or folder to write; without it, a dry run.")
    ] = None,
    origin: Annotated[str | None, typer.Option("--from", help="Format to read; by default detected.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model or pipeline; its config.json is enough. For names, a check of shapes, and GGUF."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha, where the file does not have it (loralib).")] = None,
    overwrite: Overwrite = False,
    component: Annotated[
        str | None, typer.Option(help="Which part of a pipeline the adapter is for: unet, text_encoder, ...")
    ] = None,
) -> None:
    """Convert, and print what was changed on the way."""
    from lorakit.conversion import FORMATS
    from lorakit.conversion import convert as convert_adapter
    from lorakit.files.folder import claim

    if output is not None and to in FORMATS:
        folder = not FORMATS[to].suffix or output.is_dir()
        claim(output, convert_names() if folder else (), overwrite, "convert")
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
    parts = [part for part in done.description.components if part]
    where = f" ({', '.join(parts)})" if parts else ""
    layers = plural(len(list(done.description.layers())), "layer")
    place = output if output is not None else "dry run"
    out.print(f"{place}: {layers}{where} from {done.source} to {done.target}", markup=False)
