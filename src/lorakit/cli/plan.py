"""`lorakit plan`: what training a model takes, before anything of it is loaded."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakit.cli.screen import out

HELP = "Say how many bytes training takes, full, by GaLore, LoRA and QLoRA, from the shapes of a model alone."


def plan(
    model: Annotated[str, typer.Argument(help="A hub name, a local folder, or a GGUF file; only its shapes are read.")],
    method: Annotated[str, typer.Option(help="The method of the adapter.")] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="Its rank.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    dtype: Annotated[str, typer.Option(help="Number format of the base's floats and of compute.")] = "bf16",
    quantize: Annotated[str, typer.Option(help="The base's format under QLoRA: nf4, fp4, int8.")] = "nf4",
    double: Annotated[bool, typer.Option(help="Quantise the scales of 4-bit blocks too.")] = True,
    galore_rank: Annotated[int, typer.Option(min=1, help="The rank of GaLore's space.")] = 128,
    recompute: Annotated[
        bool, typer.Option(help="Compute blocks again in the backward pass (train.memory: small).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """Print the table."""
    from rich.table import Table

    from lorakit.errors import unknown
    from lorakit.insight.plan import WAYS, gigabytes
    from lorakit.insight.plan import plan as planned
    from lorakit.methods import METHODS
    from lorakit.models.loading import resolve_dtype

    if method not in METHODS:
        raise unknown("method", method, METHODS)
    spec: Any = METHODS[method]()
    if hasattr(spec, "rank"):  # its own, or that of the method it holds
        spec = spec.replace(rank=rank)
    config = config_of(model)
    options: dict[str, Any] = {"batch": batch_size, "length": length, "dtype": resolve_dtype(dtype)[0]}
    options |= {"form": quantize, "double": double, "rank": galore_rank, "recompute": recompute}
    plans = [planned(config, way, method=spec, **options) for way in WAYS]
    if as_json:
        print(json.dumps({one.way: {"trained": one.trained, **one.parts()} for one in plans}, indent=2))
        return
    title = f"{model}: {plans[0].numbers:,} numbers, {batch_size} × {length} tokens a step"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "trained", *plans[0].parts()):
        table.add_column(heading, justify="left" if not heading else "right")
    for one in plans:
        name = {"lora": method, "qlora": f"{method} on {quantize}"}.get(one.way, one.way)
        table.add_row(name, f"{one.trained:,}", *(gigabytes(count) for count in one.parts().values()))
    out.print(table)


def config_of(model: str) -> Any:
    """The transformers configuration of a model; no weight is read, but of a GGUF file that is not in the cache yet."""
    from transformers import AutoConfig

    from lorakit.models import hub
    from lorakit.models.loading import find_local, load_model

    place = find_local(model)
    if place is not None and not (place / "config.json").exists():
        return load_model(model)[0].config
    where = str(place) if place is not None else hub.find_on_hub(model, {})
    return AutoConfig.from_pretrained(where)
