"""What share of a model's matrix numbers an adapter reaches, and what kinds of weight it leaves out."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from lorakit.adapter.targets import Targets, head_paths
from lorakit.core.known import multiplied_by
from lorakit.core.layer import Adapted
from lorakit.core.layout import Site
from lorakit.core.sites import sites_of
from lorakit.core.walking import walk
from lorakit.errors import LorakitError

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Coverage:
    """Matrix numbers: those of weights with two axes or more by which the model multiplies, so without tables that are
    looked up or added; input and output embeddings left out.

    Attributes:
        reached: numbers in matrices that the adapter changes or replaces.
        total: all of them.
        left: kind of weight ("mlp.experts.gate_up_proj", blocks' numbers as N) -> numbers that are not reached.
        reasons: kind of layer -> why presets leave it out.
    """

    reached: int
    total: int
    left: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.reached / self.total if self.total else 1.0

    def __str__(self) -> str:
        words = f"{self.share:.1%} of the matrix numbers ({self.reached:,} of {self.total:,})"
        most = sorted(self.left.items(), key=lambda item: -item[1])[:6]
        if most:
            words += "; left out: " + ", ".join(f"{kind} ({count / self.total:.1%})" for kind, count in most)
        return words


def coverage(model: nn.Module, paths: Iterable[str]) -> Coverage:
    """What the layers of these paths are of the model, which may lie on the meta device and may carry adapters."""
    modules, heads, wanted = dict(walk(model)), head_paths(model), set(paths)
    outside = {id(parameter) for path in heads if path in modules for parameter in modules[path].parameters()}
    seen: set[int] = set()
    total = reached = 0
    left: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for path, module in modules.items():
        if isinstance(module, nn.Embedding) or path in heads:
            continue
        sites, reason = _reachable(module)
        if reason and path:
            reasons.setdefault(path.rpartition(".")[2], reason)
        for name, size in _matrices(module, sites, outside, seen):
            total += size
            if path in wanted:
                reached += size
            else:
                kind = kind_of(f"{path}.{name}" if path else name)
                left[kind] = left.get(kind, 0) + size
        seen |= {id(parameter) for parameter in module._parameters.values()}
    return Coverage(reached, total, left, reasons)


def kind_of(name: str) -> str:
    """A weight's name without the numbers of its blocks."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def _reachable(module: nn.Module) -> tuple[list[Site], str]:
    """The matrices of one module that a delta can change, and why presets leave one of them out."""
    try:
        sites = sites_of(module)
    except LorakitError as problem:
        return [], str(problem).removeprefix("attach: ").partition(",")[0]
    return sites, next((site.named_only for site in sites if site.named_only), "")


def _matrices(module: nn.Module, sites: list[Site], *known: set[int]) -> list[tuple[str, int]]:
    """The matrices of one module that are not `known`: names of its tensors, and how many numbers each has as floats."""
    sizes: dict[str, int] = {}
    for site in sites:
        own = id(getattr(module, site.weight, None))
        if not any(own in ids for ids in known):
            sizes[site.weight] = sizes.get(site.weight, 0) + site.layout.shape.out * site.layout.shape.in_
    multiplied = multiplied_by(type(module))
    for name, parameter in module._parameters.items():
        bare = parameter is not None and parameter.ndim > 1 and not any(id(parameter) in ids for ids in known)
        if bare and not any(site.weight == name for site in sites) and (multiplied is None or name in multiplied):
            sizes[name] = cast(nn.Parameter, parameter).numel()
    return list(sizes.items())


def report(model: nn.Module, targets: Targets, layers: Mapping[str, Adapted]) -> None:
    """Say what an adapter reaches, and warn where a preset leaves a kind of weight out that a user would think is in."""
    if not layers:
        return
    found = coverage(model, layers)
    log.info("the adapter reaches %s", found)
    if targets.target_modules != "all-linear" or targets.layers is not None or targets.exclude_modules is not None:
        return
    for ending, reason in found.reasons.items():
        log.warning(
            "attach: all-linear leaves out %s: %s. Name it in target_modules to adapt it all the same.", ending, reason
        )
    if found.share < 0.95:
        log.warning("attach: all-linear reaches %s.", found)
