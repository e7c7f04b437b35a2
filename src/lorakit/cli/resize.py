"""`lorakit resize`: an adapter at another rank, as a plain LoRA with a rank per layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.screen import err, out, show_log

if TYPE_CHECKING:
    from lorakit.algebra.outcome import Made

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
    from lorakit import store
    from lorakit.algebra.resizing import resize_folder
    from lorakit.algebra.sources import needs_base
    from lorakit.errors import LorakitError
    from lorakit.spectrum import check_request

    check_request(rank, energy)
    if output.expanduser().resolve() == adapter.expanduser().resolve():
        raise LorakitError(f"resize: {output} is the adapter itself; choose another --output.")
    config = store.read_config(adapter)
    if base is None and not needs_base(config):
        report = resize_folder(adapter, output, rank=rank, energy=energy, own=own)
    else:
        report = _on_base(base or config.get("base_model_name_or_path"), adapter, output, rank, energy, own)
    ranks = sorted(rank for rank in report.ranks.values() if rank is not None)
    spread = (
        str(ranks[0])
        if ranks[0] == ranks[-1]
        else f"{ranks[0]} to {ranks[-1]}, {sum(ranks) / len(ranks):.1f} on average"
    )
    worst = max(report.errors, key=lambda where: report.errors[where])
    out.print(
        f"{output}: {len(ranks)} layers at rank {spread}; ΔW differs by {report.error:.2%} in all, by at most "
        f"{report.errors[worst]:.2%} ({worst})",
        markup=False,
    )


def _on_base(base: str | None, adapter: Path, output: Path, rank: int | None, energy: float | None, own: bool) -> Made:
    """With the base model, for methods whose ΔW needs its weights or its layers' shapes."""
    show_log(err)
    import torch

    import lorakit as lk
    from lorakit.algebra.resizing import resize as resize_adapter
    from lorakit.errors import LorakitError
    from lorakit.train.models import load_model

    if not base:
        raise LorakitError(f"resize: {adapter} does not name its base model; give --base.")
    model, _ = load_model(base, dtype=torch.float32)
    report = resize_adapter(lk.load(model, adapter), rank=rank, energy=energy, own=own)
    assert report.adapter is not None
    report.adapter.save(output, base=base, record={"resized": {"from": str(adapter), "error": report.error}})
    return report
