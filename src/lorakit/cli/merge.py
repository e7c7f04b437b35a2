"""`lorakit merge`: a base and an adapter become one model folder that transformers loads like any other.

An adapter that was trained on a quantised base is merged with that base, made again from the floats as it was. By default
the result is quantised too, and what that rounds is told as a number; with --dtype it is a float model, off by one
rounding only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    from lorakit.models.loading import load_model, resolve_dtype
    from lorakit.models.quantisation import as_config, holding

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LorakitError(f"merge: {output} exists and is not empty; choose another --output, or delete it first")
    wanted = own_dtype(base) if dtype == "auto" else resolve_dtype(dtype)[0]
    trained = trained_on(adapter, base)
    if trained is None and quantised_already(base) is None:
        # The sum is made in float32 and rounded once; adding in bf16 would round it to the grid of the base's
        # weights.
        model, tokenizer = load_model(base, dtype=torch.float32)
    elif trained is None:
        model, tokenizer = load_model(base, dtype=wanted)
    else:
        err.print(f"{adapter} was trained on a quantised base, which is made again from {base}", markup=False)
        computed = trained.pop("dtype")
        model, tokenizer = load_model(base, dtype=computed, quantization_config=as_config(trained))
    loaded = lk.load(model, adapter)
    few = holding(model).words()
    if few and dtype == "auto":
        report = lk.merge(model, loaded.name, untie=untie)
        worst = max(report.error, key=lambda path: report.error[path])
        mean = sum(report.error.values()) / len(report.error)
        form = f"{few}; storing the sum so is off by {mean:.2%} of it on average, {report.error[worst]:.2%} in {worst}"
    else:
        report = lk.merge(model, loaded.name, untie=untie, dtype=wanted)
        form = str(wanted).removeprefix("torch.") + (f", merged with the floats that {few} stood for" if few else "")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    out.print(
        f"{output}: {len(report.layers)} layers of {base} hold {adapter} now, in {form}",
        markup=False,
        soft_wrap=True,
    )


def trained_on(adapter: Path, base: str) -> dict[str, Any] | None:
    """How the base of an adapter was quantised as it was read, with its "dtype"; None where it was not, or where the base
    that is given is quantised by itself."""
    from lorakit.files.bundle import read_own

    found = read_own(adapter).get("base", {}).get("quantization")
    return None if not found or quantised_already(base) else {"dtype": "auto", **found}


def quantised_already(base: str) -> str | None:
    """By which method the base itself is quantised, if it is."""
    from transformers import AutoConfig

    from lorakit.models.loading import find_local
    from lorakit.models.quantisation import existing

    place = find_local(base)
    if place is not None and not (place / "config.json").exists():
        return None
    return existing(AutoConfig.from_pretrained(str(place or base)))


def own_dtype(base: str) -> torch.dtype:  # type: ignore[name-defined]  # noqa: F821 - torch is imported when it runs
    """The number format that a base model is stored in; bf16 for a GGUF file, whose weights have none of
    these."""
    import torch
    from transformers import AutoConfig

    from lorakit.models.loading import find_local

    place = find_local(base)
    if place is not None and (place.suffix == ".gguf" or not (place / "config.json").exists()):
        return torch.bfloat16
    stored = AutoConfig.from_pretrained(str(place or base)).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32
