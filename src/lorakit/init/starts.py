"""How the deltas of a new adapter are built, measured on batches where their start needs that, and initialised.

This is where an initialiser, which knows numbers, meets a model, which has layers. Nothing of the model is touched here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta, LowRank, Method, Pool, Shape
from lorakit.core.layout import Rows, Site
from lorakit.core.offset import offset
from lorakit.core.storage import FLOAT, Snapshot, storage_of
from lorakit.core.walking import exactly
from lorakit.errors import LorakitError
from lorakit.init import Default, Initialiser, Start
from lorakit.init.calibration import Batch, Matrix, calibrate
from lorakit.methods import METHODS

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that will carry deltas: the layer, its sites, and each site's spec."""

    layer: nn.Module
    sites: list[Site]
    specs: dict[str, Method]


Plan = dict[str, PlannedLayer]


@dataclass
class BuiltDeltas:
    """The deltas of a plan.

    Attributes:
        plan: the plan that was carried out; ranks may be other than asked, and layers fewer.
        patterns: field -> {pattern: value}: what gives each layer the rank it got, where ranks were changed.
        deltas: path -> site -> delta.
        weights: path -> tensor name -> the weight that takes the frozen one's place, in its stored shape.
    """

    plan: Plan
    pool: Pool
    patterns: dict[str, dict[str, Any]] = field(default_factory=dict)
    deltas: dict[str, dict[str, Delta]] = field(default_factory=dict)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def build_deltas(
    model: nn.Module,
    plan: Plan,
    start: Initialiser,
    batches: Iterable[Batch] | None = None,
    shifted: bool = False,
    originals: Mapping[str, Tensor] | None = None,
) -> BuiltDeltas:
    """Build the deltas of a plan and give them their initial values.

    Args:
        model: the model that the plan is for.
        plan: path -> layer.
        start: the initial values.
        batches: what to measure on, for starts that need inputs or gradients.
        shifted: the deltas have a start to be taken off, whose tensors are filled in later (from a file).
        originals: parameter name -> the float weight that a quantised one was made from, for starts that correct the error.

    Raises:
        LorakitError: the method's factors cannot be set, the start does not fit, or cannot be measured.
    """
    matrices = {} if isinstance(start, Default) else _matrices(plan, start)
    supply = _statistics(model, plan, start, matrices, batches)
    patterns: dict[str, dict[str, Any]] = {}
    if start.redistributes:
        found = dict(supply)
        ranks = start.ranks({name: matrices[name].measured(found[name]) for name in matrices})
        plan, patterns = redistribute(plan, ranks)
        kept = _places(plan)
        supply = _given({name: found[name] for name in kept})
    places = _places(plan)
    pool = Pool([site.layout.shape for planned in plan.values() for site in planned.sites])
    built = BuiltDeltas(plan, pool, patterns, {path: {} for path in plan})
    with contextlib.closing(supply):
        for name, statistic in supply:
            path, site = places[name]
            planned = plan[path]
            original = None if originals is None else originals.get(f"{path}.{site.weight}")
            if start.rewrites:
                _check_original(name, planned.layer, site, start, original)
            delta, W = _delta(name, planned, site, pool, start, statistic, shifted, original)
            built.deltas[path][site.name] = delta
            if W is not None:
                held = built.weights.setdefault(path, {})
                held[site.weight] = _stored(planned.layer, site, W, held.get(site.weight))
    for path, planned in plan.items():  # measured layers come in the order in which they were measured
        built.deltas[path] = {site.name: built.deltas[path][site.name] for site in planned.sites}
    return built


def _places(plan: Plan) -> dict[str, tuple[str, Site]]:
    """Every matrix's name -> where it is."""
    return {site.place(path): (path, site) for path, planned in plan.items() for site in planned.sites}


Statistics = Generator[tuple[str, Any], None, None]


def _given(statistics: Mapping[str, Any]) -> Statistics:
    yield from statistics.items()


def _statistics(
    model: nn.Module, plan: Plan, start: Initialiser, matrices: Mapping[str, Matrix], batches: Iterable[Batch] | None
) -> Statistics:
    if start.needs in ("inputs", "gradients"):
        yield from calibrate(model, matrices, start, batches)
        return
    if batches is not None:
        log.warning("attach: init=%r measures nothing, so the batches are not used.", start.name)
    yield from dict.fromkeys(_places(plan)).items()


def _check_original(name: str, layer: nn.Module, site: Site, start: Initialiser, original: Tensor | None) -> None:
    """A start that corrects the quantiser's error needs the floats that were quantised."""
    storage = storage_of(layer, site.weight)
    if storage is not FLOAT and original is None:
        raise LorakitError(
            f"attach: init={start.name!r} corrects the error of quantising {name}, which is stored as "
            f"{storage.label(layer, site.weight)}, and needs the floats that it was quantised from: "
            "attach(..., originals=float_model.state_dict()). lorakit train --quantize passes them."
        )
    if storage is not FLOAT and isinstance(site.layout, Rows):
        raise LorakitError(
            f"attach: init={start.name!r} rewrites the whole weight of a layer, and {name} is a part of one that is stored as "
            f"{storage.label(layer, site.weight)}; adapt the whole layer, without parts."
        )


def _delta(
    name: str,
    planned: PlannedLayer,
    site: Site,
    pool: Pool,
    start: Initialiser,
    statistic: Any,
    shifted: bool,
    original: Tensor | None = None,
) -> tuple[Delta, Tensor | None]:
    """One delta with its initial values; and the weight to replace the frozen one, if there is one."""
    layer, shape = planned.layer, site.layout.shape
    storage = storage_of(layer, site.weight)
    stored = site.layout.matrix(storage.read(layer, site.weight))

    def weight() -> Tensor:
        if original is None or not start.rewrites:
            return stored
        M = site.layout.matrix(original.to(stored.device))
        # transformers' Conv1D is stored transposed, and a quantised copy of it is not
        return M if M.shape == stored.shape else M.T

    def rounded(W: Tensor) -> Tensor:
        return site.layout.matrix(storage.rounded(layer, site.weight, site.layout.weight(W, W)))

    delta = planned.specs[site.name].build(shape, pool)
    dtype = torch.promote_types(stored.dtype, torch.float32)
    if any(own.device != stored.device or own.dtype != dtype for own in (*delta.parameters(), *delta.buffers())):
        delta = delta.to(device=stored.device, dtype=dtype)
    W: Tensor | None = None
    if not isinstance(start, Default):
        low = cast(LowRank, delta.low_rank())
        _, A = low.factors()
        quantiser = None if storage is FLOAT else rounded
        given = Start(name, shape, A.shape[0], low.scale, A.detach(), weight, statistic, quantiser)
        B, A, W = start.factors(given)
        low.set_factors(B, A)
    if start.shifts or shifted:
        delta = offset(delta)
    if W is not None:
        stored = (W if storage is FLOAT else rounded(W)).to(stored.dtype)
    delta.begin(stored)
    return delta, W


def _stored(layer: nn.Module, site: Site, W: Tensor, before: Tensor | None) -> Tensor:
    """A matrix in the shape of the layer's stored weight; where it is some rows of it, the others as they were."""
    stored = storage_of(layer, site.weight).read(layer, site.weight)
    W = W.to(stored.dtype)
    if not isinstance(site.layout, Rows):
        return site.layout.weight(W, stored)
    whole = stored.clone() if before is None else before
    site.layout.inner.matrix(whole)[site.layout.index(W.device)] = W
    return whole


# -- what a method must have -----------------------------------------------------------------------------------------------


def _matrices(plan: Plan, start: Initialiser) -> dict[str, Matrix]:
    """Every matrix with the rank and scale of its delta; LorakitError where its factors cannot be set."""
    known: dict[tuple[Method, Shape], tuple[int, float]] = {}
    matrices = {}
    for name, (path, site) in _places(plan).items():
        planned, shape = plan[path], site.layout.shape
        spec = planned.specs[site.name]
        if (spec, shape) not in known:
            low = settable(spec.build(shape, Pool([shape])))
            if low is None:
                raise LorakitError(
                    f"attach: {spec.name} has no low-rank factors that can be set, so init={start.name!r} cannot start it; "
                    f'init="default" is its own start. Methods that have them: {", ".join(_settable_methods())}.'
                )
            known[spec, shape] = (low.factors()[1].shape[0], low.scale)
        rank, scale = known[spec, shape]
        start.check(shape, rank, name)
        if start.redistributes and (getattr(spec, "rank", None) != rank or "rank" not in spec.pattern_fields):
            raise LorakitError(
                f"attach: init={start.name!r} redistributes ranks, and those of {spec.name} are not given per layer; leave "
                "them as they are by rho=1."
            )
        matrices[name] = Matrix(planned.layer, site, rank, scale)
    return matrices


def settable(delta: Delta) -> LowRank | None:
    """The low-rank part of a delta whose factors can be set, if it has one."""
    low = delta.low_rank()
    return None if low is None or type(low).set_factors is LowRank.set_factors else low


@functools.cache
def _settable_methods() -> tuple[str, ...]:
    names, shape = [], Shape(64, 64)
    for name, method in METHODS.items():
        with contextlib.suppress(LorakitError, TypeError):  # a method with options that have no default
            if settable(method().build(shape, Pool([shape]))) is not None:
                names.append(name)
    return tuple(names)


# -- ranks -----------------------------------------------------------------------------------------------------------------


def redistribute(plan: Plan, ranks: Mapping[str, int]) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The plan with these ranks, each layer's scale unchanged; and the patterns that say so. Rank 0 leaves a layer out."""
    patterns: dict[str, dict[str, Any]] = {"rank": {}, "alpha": {}}
    result: Plan = {}
    for path, planned in plan.items():
        specs: dict[str, Method] = {}
        for site in planned.sites:
            name = site.place(path)
            spec: Any = planned.specs[site.name]
            rank = ranks[name]
            if rank == 0 and len(planned.sites) > 1:
                raise LorakitError(
                    f"attach: no rank is left for {name}, a part of a fused layer, and its other parts get some; leave ranks "
                    "as they are by rho=1."
                )
            if rank == 0:
                continue
            own = specs[site.name] = spec.resized(rank)
            own.check(site.layout.shape, name)
            for option in patterns:
                if option in own.pattern_fields:
                    patterns[option][exactly(name)] = getattr(own, option)
        if specs:
            result[path] = PlannedLayer(planned.layer, planned.sites, specs)
    if not result:
        raise LorakitError("attach: no layer's inputs vary on these batches, so that no rank is left for any.")
    left_out = [path for path in plan if path not in result]
    log.info(
        "ranks by layer: %s%s",
        ", ".join(f"{name} {rank}" for name, rank in ranks.items()),
        f"; without an adapter: {len(left_out)} layers" if left_out else "",
    )
    return result, {option: values for option, values in patterns.items() if values}


# -- weights ---------------------------------------------------------------------------------------------------------------


def rewrite(layer: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Snapshot]:
    """Put other weights into a layer through its storage; returns what was there."""
    originals = {}
    for name, value in weights.items():
        storage = storage_of(layer, name)
        originals[name] = storage.snapshot(layer, name)
        storage.write(layer, name, value, fresh=True)
    return originals
