"""`lorakit inspect`: what an adapter is, read from its folder alone; no base model is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import out

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

HELP = "Show what an adapter is: method, base, rank and size per layer, largest singular values of what it adds; its experts."

_DIAGONAL = ".lora_E"
"""Between AdaLoRA's factors, whose names end without ".weight"."""
_EXPERT = re.compile(r"(?P<path>.+)\.experts\.(?P<expert>\d+)")
"""The name of an expert's change of a matrix, in a mixture that is one file."""


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer. `singular_values` are the largest of the matrix that is added, scale included."""

    name: str
    rank: int
    alpha: float
    scale: float
    parameters: int
    norm: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class ExpertReport:
    """One expert of a mixture, or one adapter behind a router; the norm is that of all it adds."""

    name: str
    method: str
    layers: int
    ranks: tuple[int, ...]
    parameters: int
    norm: float


@dataclass(frozen=True)
class RouterReport:
    """What weighs experts: its kind, its options (top_k, the weight of the balance loss, …), the numbers of its own, and
    how their names begin."""

    kind: str
    options: dict[str, Any]
    parameters: int
    experts: tuple[ExpertReport, ...]
    prefix: str


@dataclass(frozen=True)
class AdapterReport:
    """An adapter folder in numbers. `other` are tensors that are no factor: biases, modules trained in full, a router's.
    The experts behind a router are files of their own, and count in `router` alone."""

    folder: str
    method: str
    base: str | None
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    targets: Any
    layers: tuple[LayerReport, ...]
    other: dict[str, tuple[int, ...]]
    record: dict[str, Any]
    router: RouterReport | None = None


def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, lorakit's or PEFT's.")],
    top: Annotated[int, typer.Option(min=0, help="How many singular values per layer.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the rank of every layer into this PNG file.")] = None,
) -> None:
    """Print the report of an adapter folder."""
    from lorakit.files.interchange import bare

    report = examine(adapter, top)
    if picture is not None:
        from lorakit.cli.picture import draw_ranks
        from lorakit.errors import LorakitError

        if not report.layers:
            raise LorakitError(f"inspect: {adapter} ({report.method}) has no pairs of factors, so no ranks to draw.")
        picture.write_bytes(draw_ranks(report.layers, f"{report.folder}: {report.method}, rank per layer"))
    if as_json:
        # Plain print: JSON must not be wrapped at the width of a terminal.
        print(json.dumps(asdict(report), indent=2))
        return
    out.print(f"[bold]{report.folder}[/bold]: {report.method} for {report.base or 'an unnamed base model'}")
    size = f"{report.bytes / 2**20:.1f} MiB" if report.bytes >= 2**20 else f"{report.bytes / 2**10:.1f} KiB"
    dtypes = ", ".join(f"{dtype} ×{count}" for dtype, count in report.dtypes.items())
    ranks = sorted({layer.rank for layer in report.layers})
    places = f"{len(report.layers)} layers" if ranks else f"{len(report.other)} tensors"
    out.print(f"{report.parameters:,} parameters in {places}, {size} ({dtypes})")
    if ranks:
        out.print(f"ranks {', '.join(map(str, ranks))}; targets {_shown(report.targets)}")
    if report.record:
        out.print(_trained(report.record))
    if report.router is not None:
        out.print(_routing(report.router), markup=False)
        out.print(_experts(report.router))
    if ranks:
        out.print(_table(report, top))
    for name, shape in report.other.items():
        if report.router is None or not bare(name).startswith(report.router.prefix):
            out.print(
                f"{'also holds ' if ranks or report.router else ''}{name} {'×'.join(map(str, shape))}", markup=False
            )


def examine(folder: Path, top: int = 4) -> AdapterReport:
    """Read an adapter folder into a report.

    The singular values of B A cost what the rank costs rather than the layer (`spectrum.py`).
    Raises LorakitError for a folder that holds no readable adapter.
    """
    from lorakit.files import store
    from lorakit.files.interchange import PAIRS

    pairs = {**PAIRS, ".lora_A": ".lora_B"}
    config, own, tensors = store.read_config(folder), store.read_own(folder), store.read_tensors(folder)
    layers, used = [], set()
    for key, A in tensors.items():
        ending = next((ending for ending in pairs if key.endswith(ending)), None)
        if ending is None or key.removesuffix(ending) + pairs[ending] not in tensors:
            continue
        partner = key.removesuffix(ending) + pairs[ending]
        used |= {key, partner}
        diagonal = tensors.get(key.removesuffix(ending) + _DIAGONAL)
        if diagonal is not None:
            used.add(key.removesuffix(ending) + _DIAGONAL)
        layers.append(_layer(key.removesuffix(ending), A, tensors[partner], diagonal, config, top))
    other = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key not in used}
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    return AdapterReport(
        folder=str(folder),
        method=_method(config, own),
        base=config.get("base_model_name_or_path"),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        dtypes=dtypes,
        targets=config.get("target_modules"),
        layers=tuple(layers),
        other=other,
        record=own.get("record", {}),
        router=_router(folder, own, layers, tensors),
    )


def _layer(key: str, A: Tensor, B: Tensor, diagonal: Tensor | None, config: Mapping[str, Any], top: int) -> LayerReport:
    from lorakit.core.spectrum import spectrum
    from lorakit.files.interchange import alpha_in, bare, scale_in

    path = bare(key)
    rank = A.shape[0]
    alpha, scale = alpha_in(config, path, rank), scale_in(config, path, rank)
    if diagonal is not None:  # PEFT's AdaLoRA divides by the rank that it started from, plus a constant
        scale = alpha / (float(config.get("init_r", rank)) + 1e-5)
        B = B.double() * diagonal.double().flatten()
    values = abs(scale) * spectrum(B.flatten(1), A.flatten(1)).values
    return LayerReport(
        name=path,
        rank=rank,
        alpha=alpha,
        scale=scale,
        parameters=A.numel() + B.numel() + (0 if diagonal is None else diagonal.numel()),
        norm=float(values.square().sum().sqrt()),
        singular_values=tuple(values[:top].tolist()),
    )


def _router(
    folder: Path, own: Mapping[str, Any], layers: Sequence[LayerReport], tensors: Mapping[str, Tensor]
) -> RouterReport | None:
    """What weighs experts in this folder, if anything does."""
    from lorakit.experts import MEMBERS, MIXTURES, ROUTERS
    from lorakit.files.interchange import bare

    members = [name for name, _ in own.get("members") or ()]
    inside: dict[str, list[LayerReport]] = {}
    for layer in layers:
        found = _EXPERT.fullmatch(layer.name)
        if found:
            inside.setdefault(found["expert"], []).append(layer)
    method = own.get("method", {})
    spec = {**MIXTURES, **ROUTERS}.get(str(method.get("name")))
    if spec is None:
        return None
    reports = [(name, examine(folder / MEMBERS / name, 0)) for name in members]
    experts = [_expert(name, report.method, report.layers, report.parameters) for name, report in reports]
    for name, held in sorted(inside.items(), key=lambda item: int(item[0])):
        inner = str((method.get("inner") or {}).get("name", ""))
        experts.append(_expert(name, inner, held, sum(layer.parameters for layer in held)))
    return RouterReport(
        kind=str(method.get("name")),
        options={name: value for name, value in method.items() if name not in ("name", "inner")},
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if bare(key).startswith(spec.router_prefix)),
        experts=tuple(experts),
        prefix=spec.router_prefix,
    )


def _expert(name: str, method: str, layers: Sequence[LayerReport], parameters: int) -> ExpertReport:
    return ExpertReport(
        name=name,
        method=method,
        layers=len(layers),
        ranks=tuple(sorted({layer.rank for layer in layers})),
        parameters=parameters,
        norm=math.sqrt(sum(layer.norm**2 for layer in layers)),
    )


def _routing(router: RouterReport) -> str:
    options = ", ".join(f"{name} {value}" for name, value in router.options.items() if name != "experts")
    size = f"{router.parameters:,} parameters of its own"
    return f"router {router.kind} over {len(router.experts)} experts: {options + '; ' if options else ''}{size}"


def _experts(router: RouterReport) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("expert", overflow="fold")
    table.add_column("method")
    for column in ("layers", "ranks", "parameters", "norm of ΔW"):
        table.add_column(column, justify="right")
    for one in router.experts:
        ranks = ", ".join(map(str, one.ranks)) or "-"
        table.add_row(one.name, one.method, str(one.layers), ranks, f"{one.parameters:,}", f"{one.norm:.4g}")
    return table


def _method(config: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    options = [name for name in ("use_rslora", "use_dora") if config.get(name)]
    name = own.get("method", {}).get("name") or str(config["peft_type"]).lower()
    return name + (f" ({', '.join(option.removeprefix('use_') for option in options)})" if options else "")


def _table(report: AdapterReport, top: int) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold", min_width=24)
    for column in ("rank", "scale", "parameters", "norm of ΔW"):
        table.add_column(column, justify="right")
    if top:
        table.add_column("largest singular values", justify="right")
    for layer in report.layers:
        cells = [layer.name, str(layer.rank), f"{layer.scale:g}", f"{layer.parameters:,}", f"{layer.norm:.4g}"]
        if top:
            cells.append("  ".join(f"{value:.3g}" for value in layer.singular_values))
        table.add_row(*cells)
    return table


def _shown(targets: Any) -> str:
    return ", ".join(targets) if isinstance(targets, list) else str(targets)


def _trained(record: Mapping[str, Any]) -> str:
    words = (
        f"trained on {record['train_rows']:,} rows, {record['steps']:,} steps" if "train_rows" in record else "trained"
    )
    measured = []
    for when in ("before", "after"):
        numbers = record.get(when) or {}
        measured += [
            f"{name.replace('_', ' ')} {when} {value:.4g}" for name, value in numbers.items() if name != "rows"
        ]
    return words + (f" ({', '.join(measured)})" if measured else "")
