"""`lorakit plan`: what training a model takes, before anything of it is loaded."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakit.cli.arguments import Json
from lorakit.cli.screen import out
from lorakit.cli.tables import table
from lorakit.errors import plural

HELP = "Estimate the memory that training takes (full, GaLore, LoRA, QLoRA), from the shapes of a model alone."


def plan(
    model: Annotated[str, typer.Argument(help="Hub name, local folder or GGUF file; only its shapes are read.")],
    method: Annotated[str, typer.Option(help="Adapter method.")] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 512,
    dtype: Annotated[str, typer.Option(help="Dtype of the base and of the computation.")] = "bf16",
    quantize: Annotated[str, typer.Option(help="Format of the base for QLoRA: nf4, fp4, int8.")] = "nf4",
    double: Annotated[bool, typer.Option(help="Double quantisation of 4-bit scales.")] = True,
    galore_rank: Annotated[int, typer.Option(min=1, help="Rank of GaLore's projection.")] = 128,
    recompute: Annotated[bool, typer.Option(help="Gradient checkpointing (train.memory: small).")] = False,
    as_json: Json = False,
) -> None:
    """Print the table."""
    from lorakit.errors import unknown
    from lorakit.insight.plan import WAYS, gigabytes
    from lorakit.insight.plan import plan as planned
    from lorakit.methods import METHODS
    from lorakit.models.loading import load_model, resolve_dtype
    from lorakit.models.stored import stored_config

    if method not in METHODS:
        raise unknown("method", method, METHODS)
    spec: Any = METHODS[method]()
    if hasattr(spec, "rank"):  # its own, or that of the method it holds
        spec = spec.replace(rank=rank)
    config = stored_config(model) or load_model(model)[0].config
    options: dict[str, Any] = {"batch": batch_size, "length": length, "dtype": resolve_dtype(dtype)[0]}
    options |= {"form": quantize, "double": double, "rank": galore_rank, "recompute": recompute}
    plans = [planned(config, way, method=spec, **options) for way in WAYS]
    if as_json:
        data: dict[str, Any] = {one.way: {"trained": one.trained, **one.parts()} for one in plans}
        for one in plans:
            data[one.way] |= {"coverage": one.coverage.as_dict()} if one.coverage else {}
        print(json.dumps(data, indent=2))
        return
    names = {"lora": method, "qlora": f"{method} on {quantize}"}
    rows = [
        (names.get(one.way, one.way), f"{one.trained:,}", *(gigabytes(size) for size in one.parts().values()))
        for one in plans
    ]
    title = f"{model}: {plural(plans[0].numbers, 'parameter')}, {batch_size} × {length} tokens per step"
    out.print(table("", "trained", *plans[0].parts(), rows=rows, title=title))
    for reached in [one.coverage for one in plans if one.coverage][:1]:
        for sentence in (f"{method} reaches {reached}", *reached.capped):
            out.print(f"{sentence}.", markup=False, highlight=False)
