"""What share of a model's matrix numbers an adapter reaches, and what kinds of weight it leaves out."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.construction import capped
from lorakit.adapter.targets import PRESETS, Targets, head_paths, left_out, select
from lorakit.core.delta import Method
from lorakit.core.known import multiplied_by
from lorakit.core.layout import Site
from lorakit.core.sites import refusal, sites_of, sites_or_refusal
from lorakit.core.stacks import is_router
from lorakit.core.walking import walk

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
        capped: where a preset's rank was above what a matrix can use, a sentence per kind.
    """

    reached: int
    total: int
    left: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    capped: Sequence[str] = ()

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.reached / self.total if self.total else 1.0

    def kinds(self) -> list[str]:
        """Every kind that is left out, the largest first, with its share and the reason where a layer has one."""
        words = []
        for kind, count in sorted(self.left.items(), key=lambda item: -item[1]):
            reason = next((why for ending, why in self.reasons.items() if f".{ending}." in f".{kind}."), "")
            words.append(f"{kind} ({count / self.total:.1%}{': ' if reason else ''}{reason})")
        return words

    def __str__(self) -> str:
        words = f"{self.share:.1%} of the matrix numbers ({self.reached:,} of {self.total:,})"
        if kinds := self.kinds():
            words += f"; left out: {', '.join(kinds[:6])}" + (f" and {len(kinds) - 6} kinds more" * (len(kinds) > 6))
        return words

    def as_dict(self) -> dict[str, Any]:
        """Plain values; of the kinds that are left out, their share."""
        left = {kind: count / self.total for kind, count in self.left.items()}
        return {"share": self.share, "left": left, "reasons": dict(self.reasons), "capped": list(self.capped)}


def coverage(model: nn.Module, paths: Iterable[str]) -> Coverage:
    """What the layers of these paths are of the model, which may lie on the meta device and may carry adapters."""
    wanted = set(paths)
    return _counted(model, lambda path, _, size: size if path in wanted else 0)


def coverage_of(adapter: Adapter) -> Coverage:
    """What an adapter changes of its model: matrix by matrix, of a fused layer the rows of its parts."""
    reached: Counter[str] = Counter()
    given: list[tuple[str, Site, Method]] = []
    for path, site, delta in adapter.deltas():
        reached[f"{path}.{site.weight}"] += site.layout.shape.out * site.layout.shape.in_
        given.append((path, site, delta.spec))
    for path, replacement in adapter.replacements():
        reached.update({f"{path}.{name}": tensor.numel() for name, tensor in replacement.tensors().items()})
    found = _counted(adapter.model, lambda path, name, size: min(size, reached[f"{path}.{name}"]))
    return replace(found, capped=_lowered(adapter.method, adapter.targets, given))


def planned_coverage(model: nn.Module, method: Method, targets: Targets) -> Coverage:
    """What an adapter of these targets will change of a model, by its shapes."""
    paths, modules = select(model, targets), dict(walk(model))
    sites = [(path, site) for path in paths for site in sites_of(modules[path])]
    given = [(path, site, capped(targets.spec_for(method, path, site), site.layout.shape)) for path, site in sites]
    return replace(coverage(model, paths), capped=_lowered(method, targets, given))


def _lowered(method: Method, targets: Targets, given: Iterable[tuple[str, Site, Method]]) -> tuple[str, ...]:
    """A sentence per kind of layer in which a preset's rank was lowered to what the matrix can use."""
    if targets.target_modules not in PRESETS:
        return ()
    said: dict[str, None] = {}
    for path, site, own in given:
        shape = site.layout.shape
        asked, rank = (getattr(spec, "rank", None) or 0 for spec in (targets.spec_for(method, path, site), own))
        if 0 < rank < asked and rank == min(shape.out, shape.in_):
            words = f"{kind_of(site.place(path))} gets rank {rank} instead of {asked}"
            said[f"{words}, the most that its {shape.out} × {shape.in_} can use"] = None
    return tuple(said)


def _counted(model: nn.Module, reached_of: Callable[[str, str, int], int]) -> Coverage:
    """The sums over a model's matrices, by `reached_of(path, tensor, its size)`."""
    modules, heads = dict(walk(model)), head_paths(model)
    outside = {id(parameter) for path in heads if path in modules for parameter in modules[path].parameters()}
    seen: set[int] = set()
    total = reached = 0
    left: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for path, module in modules.items():
        if isinstance(module, nn.Embedding) or path in heads:
            continue
        sites, reason = _reachable(module)
        if reason and path:
            reasons.setdefault(path.rpartition(".")[2], reason)
        for name, size in _matrices(module, sites, outside, seen):
            own = reached_of(path, name, size)
            total, reached = total + size, reached + own
            if own < size:
                left[kind_of(f"{path}.{name}" if path else name)] += size - own
        seen |= {id(parameter) for parameter in module._parameters.values()}
    return Coverage(reached, total, left, reasons)


def kind_of(name: str) -> str:
    """A weight's name without the numbers of its blocks."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def _reachable(module: nn.Module) -> tuple[list[Site], str]:
    """The matrices of one module that a delta can change, and why presets leave one of them out."""
    sites, reason = sites_or_refusal(module)
    if reason:
        return [], reason.partition(",")[0]
    if is_router(module):  # left out on purpose, of which nobody needs to be warned
        return sites, ""
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


def report(adapter: Adapter) -> None:
    """Say what an adapter reaches, and warn where a preset leaves a kind of weight out that a user would think is in."""
    if not adapter.layers:
        return
    found, targets = coverage_of(adapter), adapter.targets
    log.info("the adapter reaches %s", found)
    for sentence in found.capped:
        log.warning("attach: %s.", sentence)
    if (
        isinstance(targets.target_modules, str)
        and targets.target_modules not in PRESETS
        and not targets.exclude_modules
    ):
        for path, reason in left_out(adapter.model, targets.target_modules).items():
            log.warning("attach: target_modules matches %s, which is left out: %s", path, reason)
    if targets.target_modules != "all-linear" or targets.layers is not None or targets.exclude_modules is not None:
        return
    for ending, reason in found.reasons.items():
        fixed = any(refusal(module) for path, module in walk(adapter.model) if path.rpartition(".")[2] == ending)
        where = "modules_to_save to train it whole" if fixed else "target_modules to adapt it all the same"
        log.warning("attach: all-linear leaves out %s: %s. Name it in %s.", ending, reason, where)
    if found.share < 0.95:
        log.warning("attach: all-linear reaches %s.", found)
