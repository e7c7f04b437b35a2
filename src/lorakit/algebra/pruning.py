"""A smaller adapter: layers or ranks that do little are left out, by their size or by what they do to the loss on data.

    what      by       the effect of one
    layers    norm     ‖ΔW‖
    layers    loss     how much the loss rises when this layer's change is left out, measured
    ranks     norm     the singular value; all layers compete, so that each gets the rank it needs
    ranks     loss     how much the loss would rise without it to first order, |σ ∂L/∂σ|: one pass with gradients for all

Size says nothing of use: a large change that reads what never occurs can go. The first order is an estimate and the sum
of many small rises is not the rise of all together, so the loss of the result is measured as well.
Molchanov et al. 2017, arXiv 1611.06440 (the first order).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.attachment import detach
from lorakit.algebra.changes import Change, Cut, cut, kept
from lorakit.algebra.outcome import Made, make
from lorakit.algebra.sources import Live, Source, checked_batches, refuse_biases, source
from lorakit.core.using import use
from lorakit.errors import LorakitError
from lorakit.init.calibration import Batch

WHAT = ("layers", "ranks")
BY = ("norm", "loss")


@dataclass(frozen=True)
class Pruned:
    """What a pruning did.

    Attributes:
        made: the new adapter or folder; its errors count what was left out, a layer that is gone with 1.
        effects: place -> the effect of each unit of it, the largest first (one number where whole layers were weighed).
        dropped: places that are gone.
        loss: on the batches, of the adapter before and after; None without batches.
    """

    made: Made
    effects: dict[str, tuple[float, ...]]
    dropped: tuple[str, ...]
    loss: tuple[float, float] | None = None


def prune(
    adapter: Adapter | str | Path,
    *,
    keep: float | int,
    what: str = "layers",
    by: str = "norm",
    batches: Iterable[Batch] | None = None,
    name: str | None = None,
    output: str | Path | None = None,
) -> Pruned:
    """Make a smaller adapter of one; the adapter itself stays as it is.

    Args:
        adapter: of any method, on its model; or a LoRA's folder, by norm.
        keep: how many layers or ranks of all of them stay: a share as a float below 1 (or 1.0), or a count as an integer.
        what: "layers" or "ranks".
        by: "norm", or "loss", measured on `batches`.
        batches: each the arguments of one `model(**batch)` that returns a loss.
        name: of the new adapter on the model; the old one's with "-pruned" by default.
        output: the folder to write, for a folder.

    Raises:
        LorakitError: the request makes no sense, or a batch gives no loss.
    """
    _check(keep, what, by, batches)
    given = source(adapter, "prune", output)
    refuse_biases(given, "prune")
    measured = None if batches is None else checked_batches("prune: batches", batches)
    if not isinstance(given, Live) and (by == "loss" or measured is not None):
        raise LorakitError(
            "prune: the loss is measured through the base model; lk.load the folder, and prune the adapter."
        )
    if by == "norm":
        effects = _by_norm(given, what)
    else:
        effects = (_by_absence if what == "layers" else _by_first_order)(cast(Live, given), measured or [])
    cuts, gone = _cuts(given, effects, keep, what)
    name = name or f"{given.label}-pruned"
    record = {"keep": keep, "what": what, "by": by, "dropped": list(gone)}
    replaced = given.replaced()
    result = make([given], cuts, replaced, name=name, output=output, done="pruned", what=record, gone=gone)
    losses = None
    if measured is not None:
        live, smaller = cast(Live, given).adapter, cast(Adapter, result.adapter)
        losses = _loss(live.model, live.name, measured), _loss(live.model, smaller.name, measured)
    return Pruned(result, effects, tuple(gone), losses)


def _check(keep: float | int, what: str, by: str, batches: Iterable[Batch] | None) -> None:
    for name, value, known in (("what", what, WHAT), ("by", by, BY)):
        if value not in known:
            raise LorakitError(f"prune: {name} was given as {value!r}; it is {' or '.join(known)}.")
    share = isinstance(keep, float) and 0 < keep <= 1
    count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not share and not count:
        raise LorakitError(
            f"prune: keep was given as {keep!r}; it is a share above 0 and at most 1.0, or a count of at least 1."
        )
    if by == "loss" and batches is None:
        raise LorakitError(
            "prune: by='loss' measures on data; give batches=[…], each the arguments of one model(**batch)."
        )


# -- effects ----------------------------------------------------------------------------------------------------------------


def _by_norm(source: Source, what: str) -> dict[str, tuple[float, ...]]:
    if what == "layers":
        return {place: (source.change(place).norm(),) for place in source.places()}
    return {place: tuple(source.change(place).spectrum().values.tolist()) for place in source.places()}


def _loss(model: nn.Module, name: str, batches: list[Batch]) -> float:
    """The mean loss over batches with this adapter, in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad(), use(model, name):
            return sum(float(_loss_of(model, batch)) for batch in batches) / len(batches)
    finally:
        for module in training:
            module.training = True


def _loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise LorakitError(f"prune: the model gives no loss for a batch with {', '.join(batch)}; batches need labels.")
    return loss


def _by_absence(live: Live, batches: list[Batch]) -> dict[str, tuple[float, ...]]:
    """The rise of the loss without each place's delta, which is taken out of its layer for the time of a pass."""
    adapter = live.adapter
    whole = _loss(adapter.model, adapter.name, batches)
    effects: dict[str, tuple[float, ...]] = {}
    for place, (path, site, _) in live.at.items():
        layer = adapter.layers[path]
        deltas = layer.deltas_of(adapter.name)
        others = {key: delta for key, delta in deltas.items() if key != site.name}
        del layer.deltas[adapter.name]
        try:
            layer.add(adapter.name, others, None)
            effects[place] = (_loss(adapter.model, adapter.name, batches) - whole,)
        finally:
            layer.add(adapter.name, deltas, None)
    return effects


def _by_first_order(live: Live, batches: list[Batch]) -> dict[str, tuple[float, ...]]:
    """|σ ∂L/∂σ| of every rank, in the order of falling singular values. Scaling a column of B scales its rank's part of ΔW,
    so it is the product of that column with its gradient."""
    model = live.adapter.model
    whole = {place: cut(live.change(place), energy=1.0) for place in live.places()}
    exact = make([live], whole, {}, name=f"{live.label}-exact", output=None, done="cut", what={})
    twin = cast(Adapter, exact.adapter)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        twin.requires_grad_(True)
        with use(model, twin.name):
            for batch in batches:
                _loss_of(model, batch).backward()
        effects: dict[str, tuple[float, ...]] = {}
        for path, site, delta in twin.deltas():
            place = site.place(path)
            B: Any = delta.B
            gradient = torch.zeros_like(B) if B.grad is None else B.grad
            effects[place] = tuple(((B * gradient).sum(0).abs() / len(batches)).tolist())
        return effects
    finally:
        detach(model, twin.name)
        for module in training:
            module.training = True


# -- what stays --------------------------------------------------------------------------------------------------------------


def _cuts(
    given: Source, effects: Mapping[str, tuple[float, ...]], keep: float | int, what: str
) -> tuple[dict[str, Cut], dict[str, Cut]]:
    """What is kept of every place; and the places that are gone, with what is lost there."""
    units = sorted(
        ((value, place, index) for place, values in effects.items() for index, value in enumerate(values)),
        key=lambda unit: -unit[0],
    )
    count = max(1, math.ceil(keep * len(units) - 1e-9)) if isinstance(keep, float) else keep
    if count > len(units):
        raise LorakitError(f"prune: keep was given as {keep}; the adapter has {len(units)} {what}.")
    chosen: dict[str, list[int]] = {}
    for _, place, index in units[:count]:
        chosen.setdefault(place, []).append(index)
    cuts: dict[str, Cut] = {}
    gone: dict[str, Cut] = {}
    for place in given.places():
        change = given.change(place)
        if place not in chosen:
            gone[place] = Cut(change, change.norm(), change.norm())
        else:
            cuts[place] = kept(change) if what == "layers" else _picked(change, sorted(chosen[place]))
    return cuts, gone


def _picked(change: Change, indices: list[int]) -> Cut:
    """A change with these of its singular triplets alone."""
    found = change.spectrum()
    root = found.values[indices].sqrt()
    gone = found.values.clone()
    gone[indices] = 0.0
    picked = Change(found.U[:, indices] * root, root[:, None] * found.Vh[indices])
    return Cut(picked, float(found.values.norm()), float(gone.norm()))
