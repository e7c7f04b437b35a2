"""`lorakit inspect`: what an adapter is, read from its folder alone; no base model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.arguments import Adapter, Json, Picture
from lorakit.cli.screen import out
from lorakit.cli.tables import table
from lorakit.errors import LorakitError, plural

if TYPE_CHECKING:
    from lorakit.insight.inspection import AdapterReport

HELP = "Show an adapter: method, base, rank and size per layer, largest singular values of ΔW, experts."


def inspect(
    adapter: Adapter,
    top: Annotated[int, typer.Option(min=0, help="Number of singular values per layer.")] = 4,
    as_json: Json = False,
    picture: Picture = None,
) -> None:
    """Print the report of an adapter folder."""
    from lorakit.files.folder import check_writable
    from lorakit.files.interchange import bare
    from lorakit.insight.inspection import examine

    if picture is not None:
        check_writable(picture, "inspect")
    report = examine(adapter, top)
    if picture is not None:
        from lorakit.insight.picture import draw_ranks

        if not report.layers:
            raise LorakitError(f"inspect: {adapter} ({report.method}) has no pairs of factors, so no ranks to draw.")
        picture.write_bytes(draw_ranks(report.layers, f"{report.folder}: {report.method}, rank per layer"))
    if as_json:
        # Plain print: JSON must not be wrapped at the width of a terminal.
        print(json.dumps(asdict(report), indent=2))
        return
    out.print(f"[bold]{report.folder}[/bold]: {report.method} for {report.base or 'an unnamed base model'}")
    size = f"{report.bytes / 2**20:.1f} MiB" if report.bytes >= 2**20 else f"{report.bytes / 2**10:.1f} KiB"
    places = plural(len(report.layers), "layer") if report.layers else plural(len(report.other), "tensor")
    out.print(f"{plural(report.parameters, 'parameter')} in {places}, {size} ({', '.join(report.dtypes)})")
    if report.layers:
        ranks = ", ".join(map(str, sorted({layer.rank for layer in report.layers})))
        targets = ", ".join(report.targets) if isinstance(report.targets, list) else report.targets
        out.print(f"rank {ranks}; targets {targets}")
    if report.record:
        out.print(_trained(report.record), markup=False)
    if report.router is not None:
        _print_router(report)
    if report.layers:
        _print_layers(report, top)
    for name, shape in report.other.items():
        if report.router is None or not bare(name).startswith(report.router.prefix):
            also = "also holds " if report.layers or report.router else ""
            out.print(f"{also}{name} {'×'.join(map(str, shape))}", markup=False)


def _trained(record: Mapping[str, Any]) -> str:
    """What training did, in one line: "trained on 56 rows, 30 steps: loss 10.86 -> 9.99, token accuracy 1% -> 58%"."""
    if "train_rows" not in record:
        return "trained"
    words = f"trained on {plural(record['train_rows'], 'row')}, {plural(record['steps'], 'step')}"
    before, after = record.get("before") or {}, record.get("after") or {}
    measured = []
    for name in sorted({**before, **after}, key=lambda name: name != "loss"):
        if name not in ("rows", "perplexity"):  # perplexity is the loss by another name
            numbers = [when[name] for when in (before, after) if isinstance(when.get(name), int | float)]
            form = ".0%" if name != "loss" else ".2f" if min(numbers, default=0) >= 1 else ".3g"
            values = " -> ".join(f"{number:{form}}" for number in numbers)
            measured += [f"{name.replace('_', ' ')} {values}"] if values else []
    return words + (f": {', '.join(measured)}" if measured else "")


def _print_router(report: AdapterReport) -> None:
    router = report.router
    assert router is not None
    options = "".join(f"{name} {value}, " for name, value in router.options.items() if name != "experts")
    own = f"{options}{plural(router.parameters, 'own parameter')}"
    out.print(f"router {router.kind} over {plural(len(router.experts), 'expert')}: {own}", markup=False)
    rows = [
        (
            one.name,
            one.method,
            str(one.layers),
            ", ".join(map(str, one.ranks)) or "-",
            f"{one.parameters:,}",
            f"{one.norm:.4g}",
        )
        for one in router.experts
    ]
    out.print(table("expert", "method", "layers", "ranks", "parameters", "norm of ΔW", rows=rows))


def _print_layers(report: AdapterReport, top: int) -> None:
    rows = []
    for layer in report.layers:
        row = [layer.name, str(layer.rank), f"{layer.scale:g}", f"{layer.parameters:,}", f"{layer.norm:.4g}"]
        rows.append([*row, "  ".join(f"{value:.3g}" for value in layer.singular_values)] if top else row)
    headings = ["rank", "scale", "parameters", "norm of ΔW", *(["largest singular values"] if top else [])]
    out.print(table("layer", *headings, rows=rows))
