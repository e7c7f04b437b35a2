"""`lorakit merge`: a base and an adapter become one model folder that transformers loads like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.screen import err, out, show_log

HELP = "Write an adapter into its base model's weights and save the result as a model folder."


def merge(
    base: Annotated[str, typer.Argument(help="The base model: a hub name, a local folder or a GGUF file.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not hold anything yet.")],
    dtype: Annotated[
        str, typer.Option(help="Number format of the written weights: bf16, fp16, fp32; auto keeps the base's own.")
    ] = "auto",
    untie: Annotated[
        bool, typer.Option(help="Where an adapted weight is shared by two layers (tied embeddings), give each its own.")
    ] = False,
) -> None:
    """Merge and save."""
    show_log(err)
    import torch

    import lorakit as lk
    from lorakit.errors import LorakitError
    from lorakit.train.models import load_model, resolve_dtype

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LorakitError(f"merge: {output} exists and is not empty; choose another --output, or delete it first")
    wanted = own_dtype(base) if dtype == "auto" else resolve_dtype(dtype)[0]
    # The sum is made in float32 and rounded once; adding in bf16 would round it to the grid of the base's
    # weights.
    model, tokenizer = load_model(base, dtype=torch.float32)
    loaded = lk.load(model, adapter)
    report = lk.merge(model, loaded.name, untie=untie)
    model.to(wanted)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    out.print(
        f"{output}: {len(report.layers)} layers of {base} hold {adapter} now, in {str(wanted).removeprefix('torch.')}",
        markup=False,
    )


def own_dtype(base: str) -> torch.dtype:  # type: ignore[name-defined]  # noqa: F821 - torch is imported when it runs
    """The number format that a base model is stored in; bf16 for a GGUF file, whose weights have none of
    these."""
    import torch
    from transformers import AutoConfig

    from lorakit.train.models import find_local

    place = find_local(base)
    if place is not None and (place.suffix == ".gguf" or not (place / "config.json").exists()):
        return torch.bfloat16
    stored = AutoConfig.from_pretrained(str(place or base)).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32
