"""`lorakit bench-serve`: load on a running server, with adapters of different popularity; a table and a picture."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import err, out

if TYPE_CHECKING:
    from rich.table import Table

    from lorakit.serve.load import Outcome

HELP = "Measure a running `lorakit serve` (or any server with OpenAI's API) under load: throughput and latency."

COLUMNS = {
    "popularity": "popularity", "distinct": "models", "errors": "errors", "tokens_per_second": "tokens/s",
    "first_p50_ms": "first token p50", "first_p95_ms": "p95", "token_p50_ms": "per token p50", "total_p95_ms": "whole p95",
}  # fmt: skip


def bench_serve(
    url: Annotated[str, typer.Argument(help="The server.")] = "http://127.0.0.1:8000",
    popularity: Annotated[
        list[str] | None,
        typer.Option(
            "--popularity", "-p", help="base, distinct, uniform, zipf or identical; may be repeated; default: all."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per popularity.")] = 64,
    concurrent: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 64,
    answer: Annotated[int, typer.Option(min=1, help="Answer tokens.")] = 64,
    key: Annotated[str, typer.Option(envvar="LORAKIT_KEY", help="An API key.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of prompts and adapters.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Also save a picture as this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """One load after the other; ends with 1 where a request failed."""
    from rich.progress import Progress

    from lorakit.files.folder import check_writable
    from lorakit.serve.load import POPULARITIES, Load, check_popularity, drive

    for one in popularity or ():
        check_popularity(one)
    if picture is not None:
        check_writable(picture, "bench-serve")
    load = Load(url.rstrip("/").removesuffix("/v1"), key, requests, concurrent, prompt, answer, seed)
    outcomes: list[Outcome] = []
    with Progress(console=err, transient=True) as progress:
        for one in popularity or ["base", *(name for name in POPULARITIES if name != "base")]:
            task = progress.add_task(one, total=requests)
            outcomes.append(asyncio.run(drive(load, one, lambda sample, task=task: progress.advance(task))))  # type: ignore[misc]
    if as_json:
        print(json.dumps([outcome.row() for outcome in outcomes], indent=2))
    else:
        out.print(tabulate(outcomes))
    if picture is not None:
        picture.write_bytes(
            draw(outcomes, f"{load.requests} requests, {concurrent} at once, {prompt} + {answer} tokens")
        )
    failed = [sample for outcome in outcomes for sample in outcome.samples if sample.error]
    for sample in failed[:5]:
        err.print(f"{sample.model}: {sample.error}", style="red", markup=False)
    if failed:
        raise typer.Exit(1)


def tabulate(outcomes: Sequence[Outcome]) -> Table:
    """The outcomes as a table; times in milliseconds."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, title in COLUMNS.items():
        table.add_column(title, justify="left" if name == "popularity" else "right")
    for outcome in outcomes:
        row = outcome.row()
        table.add_row(*(str(row[name]) for name in COLUMNS))
    return table


def draw(outcomes: Sequence[Outcome], title: str) -> bytes:
    """Tokens per second of each load, and how long first tokens took, as PNG bytes."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    names = [f"{outcome.popularity}\n{outcome.distinct} model{'s' * (outcome.distinct != 1)}" for outcome in outcomes]
    figure = Figure(figsize=(8.6, 3.4), dpi=130, layout="constrained")
    speed: Any
    first: Any
    speed, first = figure.subplots(1, 2)
    bars = speed.bar(names, [outcome.tokens_per_second for outcome in outcomes], color="#2b6cb0")
    speed.bar_label(bars, fmt="%.0f", fontsize=8)
    speed.set_ylabel("generated tokens per second")
    first.boxplot([[1000 * one.first for one in outcome.good] or [0.0] for outcome in outcomes], showfliers=False)
    first.set_xticks(range(1, len(names) + 1), names)
    first.set_ylabel("first token, ms")
    first.set_ylim(bottom=0)
    for axis in (speed, first):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
