"""`lorakit resize`: an adapter at another rank, as a plain LoRA with a rank per layer."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli.arguments import Adapter, Base, Energy, Output, Overwrite, Rank
from lorakit.cli.outcome import on_base

HELP = "Change an adapter's rank: to --rank, or per layer to what --energy needs. Writes a plain LoRA."


def resize(
    adapter: Adapter,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    own: Annotated[
        bool, typer.Option("--own", help="Keep the ranks that the method puts first (DyLoRA, AdaLoRA); needs --rank.")
    ] = False,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Resize, and print the error."""
    from lorakit.algebra.resizing import resize as resize_adapter
    from lorakit.core.spectrum import check_request

    check_request(rank, energy)
    with on_base("resize", [adapter], base, output, overwrite) as given:
        given.finish(resize_adapter(given.adapters[0], rank=rank, energy=energy, own=own, output=given.output))
