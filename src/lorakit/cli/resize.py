"""`lorakit resize`: an adapter at another rank, as a plain LoRA with a rank per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.outcome import on_base, told, unlike
from lorakit.cli.screen import out

HELP = "Write an adapter at another rank, or at the ranks that keep a share of its energy, as a plain LoRA."


def resize(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of every layer.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of each layer's squared singular values to keep.")
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Keep what the method itself puts first (DyLoRA, AdaLoRA); needs --rank.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The base model, for methods other than LoRA; by default the one in the file.")
    ] = None,
) -> None:
    """Resize, and say what it cost."""
    from lorakit.algebra.resizing import resize as resize_adapter
    from lorakit.algebra.resizing import resize_folder
    from lorakit.core.spectrum import check_request

    check_request(rank, energy)
    unlike("resize", output, [adapter])
    with on_base("resize", base, [adapter]) as given:
        if given.on_model:
            report = resize_adapter(given.adapters[0], rank=rank, energy=energy, own=own)
            given.save(report, output, {"resized": {"from": str(adapter), **report.record()}})
        else:
            report = resize_folder(adapter, output, rank=rank, energy=energy, own=own)
    out.print(told(output, report), markup=False)
