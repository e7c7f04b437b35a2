"""What an adapter is, read from its folder alone; no base model is loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.core.spectrum import spectrum
from lorakit.core.storage.contract import finite
from lorakit.errors import LorakitError
from lorakit.experts import MEMBERS, MIXTURES, ROUTERS
from lorakit.files.bundle import read_config, read_own, read_tensors
from lorakit.files.formats import adalora_scale, format_of
from lorakit.files.interchange import alpha_in, bare, scale_in
from lorakit.files.pairs import DIAGONAL, PAIRS, TRIPLETS, pair_of
from lorakit.files.stacked import unstack

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


def examine(folder: Path, top: int = 4) -> AdapterReport:
    """Read an adapter folder into a report.

    The singular values of B A cost what the rank costs rather than the layer (`spectrum.py`).
    Raises LorakitError for a folder that holds no readable adapter.
    """
    config, own, tensors = read_config(folder), read_own(folder), read_tensors(folder)
    for key, tensor in tensors.items():
        if not finite(tensor):
            raise LorakitError(
                f"inspect: {key} in {folder} holds a NaN or an infinity; the adapter was not trained well."
            )
    parameters = sum(tensor.numel() for tensor in tensors.values())
    asked = config.get("target_modules") or config.get("target_parameters")
    apart = unstack(tensors, config, f"inspect: {folder}", trusted=bool(own))
    config, tensors = apart.config, apart.tensors
    layers: dict[str, LayerReport] = {}
    used: set[str] = set()
    for key in tensors:
        found = pair_of(key, {**PAIRS, **TRIPLETS})
        if found is None or found[1] not in tensors or found[2] not in tensors:
            continue
        stem, key_A, key_B = found
        used |= {key_A, key_B, stem + DIAGONAL}
        if stem not in layers:
            layers[stem] = _layer(bare(stem), tensors[key_A], tensors[key_B], tensors.get(stem + DIAGONAL), config, top)
    return AdapterReport(
        folder=str(folder),
        method=_method(config, own),
        base=config.get("base_model_name_or_path"),
        parameters=parameters,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        targets=asked,
        layers=tuple(layers.values()),
        other={key: tuple(tensor.shape) for key, tensor in tensors.items() if key not in used},
        record=own.get("record", {}),
        router=_router(folder, own, layers.values(), tensors),
    )


def _layer(
    path: str, A: Tensor, B: Tensor, diagonal: Tensor | None, config: Mapping[str, Any], top: int
) -> LayerReport:
    rank = A.shape[0]
    alpha, scale = alpha_in(config, path, rank), scale_in(config, path, rank)
    if diagonal is not None:
        scale = adalora_scale(config, rank)
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
    folder: Path, own: Mapping[str, Any], layers: Iterable[LayerReport], tensors: Mapping[str, Tensor]
) -> RouterReport | None:
    """What weighs experts in this folder, if anything does."""
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
    prefix = format_of(spec.name).router
    reports = [(name, examine(folder / MEMBERS / name, 0)) for name in members]
    experts = [_expert(name, report.method, report.layers, report.parameters) for name, report in reports]
    for name, held in sorted(inside.items(), key=lambda item: int(item[0])):
        inner = str((method.get("inner") or {}).get("name", ""))
        experts.append(_expert(name, inner, held, sum(layer.parameters for layer in held)))
    return RouterReport(
        kind=str(method.get("name")),
        options={name: value for name, value in method.items() if name not in ("name", "inner")},
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if bare(key).startswith(prefix)),
        experts=tuple(experts),
        prefix=prefix,
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


def _method(config: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    options = [name for name in ("use_rslora", "use_dora") if config.get(name)]
    name = own.get("method", {}).get("name") or str(config["peft_type"]).lower()
    return name + (f" ({', '.join(option.removeprefix('use_') for option in options)})" if options else "")
