"""Several adapters as one: sums, concatenations, cuts, TIES, DARE, of any methods and mixtures of methods.

Everything is over ΔW, matrix by matrix, in float64; a recipe of the table says what is done to the τᵢ = ΔWᵢ of a matrix:

    1. sparsify    keep a share `density` of each τᵢ: the largest entries, or random ones
    2. rescale     what is kept is divided by the density, so that its expectation is τᵢ
    3. consensus   the sign of Σ wᵢ τᵢ is elected per entry; what disagrees with it is left out
    4. sum         Σ wᵢ τᵢ over what is left
    5. mean        divided by Σ |wᵢ| over those that agreed in this entry
    6. factor      times λ

Or, where a recipe measures data, the sum is one that weighs every direction by what the data say (`importance.py`).

So `linear` is the weighted sum and no more (task arithmetic with negative weights and λ), and where there is a mean the
weights say how much each counts in it, whatever they add up to. The signs of factors mean nothing, B A = (-B)(-A), so
nothing of this is ever done to factors apart.

TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099. Task arithmetic: Ilharco et al. 2022,
arXiv 2212.04089.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.algebra.changes import Change, Cut, cut, kept, total
from lorakit.algebra.importance import IMPORTANCES, Findings
from lorakit.algebra.outcome import Made, make
from lorakit.algebra.recipes import RECIPES, Combination, Recipe
from lorakit.algebra.sources import Live, Source, Stored, check_bases, check_output, check_shapes, sources
from lorakit.core.layer import Adapted
from lorakit.core.options import check, options_of
from lorakit.core.spectrum import check_request
from lorakit.core.walking import value_for
from lorakit.errors import LorakitError, unknown
from lorakit.files.interchange import bare
from lorakit.init.calibration import Batch

DENSITY = 0.2
"""The share of entries that TIES keeps in its paper."""


def combine(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    how: str = "linear",
    *,
    batches: Sequence[Iterable[Batch]] | None = None,
    name: str = "combined",
    output: str | Path | None = None,
    **options: Any,
) -> Made:
    """Make one adapter of several; they and the base stay as they are.

    On a model they may be of any methods, and the result is put beside them, inactive. Folders must hold LoRAs (or whole
    matrices), no base is loaded, and the result is written to `output`.

    The result is a plain LoRA where all have factors and the recipe keeps them, or where `rank` or `energy` is given; its
    error is reported then. Else it holds whole matrices (`Full`). Trained biases and modules_to_save become
    `base + Σ weight · (own - base)`.

    Args:
        adapters: on one model, or folders for one base.
        weights: one per adapter; 1/n each by default. May be negative.
        how: a row of `RECIPES`.
        batches: for the recipes that measure ("regmean", "fisher"): for each adapter a list of batches of its own data, each
            the arguments of one `model(**batch)`; with labels for "fisher".
        name: of the new adapter on the model.
        output: the folder to write, for folders.
        options: the others of `Combination`: rank or energy (cut the result per layer), density (the share of entries to keep,
            0.2 by default), factor (λ, times everything), layer_weights ({pattern: weights} for layers whose name the pattern
            ends; the first match counts), seed (of DARE's random entries; the same for a layer whatever others there are).

    Raises:
        LorakitError: the request makes no sense or cannot be met; nothing has changed or been written then.
    """
    known = options_of(Combination)
    for option in options:
        if option not in known:
            raise unknown("option of combine", option, known)
    asked = Combination(None if weights is None else tuple(weights), how, **options)
    return _combined(adapters, asked, batches, name, output, "combined")


def scale(
    adapter: Adapter | str | Path,
    factor: float,
    *,
    rank: int | None = None,
    energy: float | None = None,
    name: str | None = None,
    output: str | Path | None = None,
) -> Made:
    """Make an adapter that adds `factor` times what another adds; the other stays as it is.

    For the time of a call no new adapter is needed: lk.use(model, {"a": 0.5}).

    Args:
        adapter: of any method, on its model; or a LoRA's folder.
        factor: 0.5 halves its effect, -1 reverses it.
        rank, energy: cut the result, as in `combine`.
        name: of the new adapter; the old one's with "-scaled" by default.
        output: the folder to write, for a folder.

    Raises:
        LorakitError: as `combine`; nothing has changed or been written then.
    """
    if not math.isfinite(factor) or factor == 0:
        raise LorakitError(f"scale: the factor is {factor:g}; give a finite number other than 0.")
    own = f"{adapter.name}-scaled" if isinstance(adapter, Adapter) else "scaled"
    return _combined([adapter], Combination((factor,), rank=rank, energy=energy), None, name or own, output, "scaled")


def _combined(
    adapters: Sequence[Adapter | str | Path],
    asked: Combination,
    batches: Sequence[Iterable[Batch]] | None,
    name: str,
    output: str | Path | None,
    done: str,
) -> Made:
    asked = _checked(asked, len(adapters))
    given = sources(adapters, "combine")
    findings = _findings(asked, given, batches)
    places = list(dict.fromkeys(place for one in given for place in one.places()))
    _check_patterns(asked, places)
    check_output(given, "combine", output)
    if output is None:
        replaced: dict[str, Any] = _replaced(cast(Sequence[Live], given), asked)
    else:
        check_bases(cast(Sequence[Stored], given), "combine")
        replaced = _replaced_in_folders(cast(Sequence[Stored], given), asked)
    cuts: dict[str, Cut] = {}
    for place in places:
        found = _one(given, place, asked, findings)
        if found is not None:
            whole = asked.rank is None and asked.energy is None
            cuts[place] = kept(found) if whole else cut(found, asked.rank, asked.energy)
    if not cuts:
        raise LorakitError("combine: every weight is zero, so that nothing would be left.")
    weights = list(asked.weights or ())
    what = {"factor": weights[0]} if done == "scaled" else {"weights": weights, "how": asked.how}
    return make(given, cuts, replaced, name=name, output=output, done=done, what=what)


# -- what was asked ---------------------------------------------------------------------------------------------------------


def _checked(asked: Combination, count: int) -> Combination:
    """The request with its weights filled in, where it makes sense."""
    how = asked.how
    if how not in RECIPES:
        raise unknown("way to combine", how, RECIPES)
    recipe = asked.recipe
    check_request(asked.rank, asked.energy, "combine", needed=recipe.result == "cut")
    if recipe.result == "factors" and (asked.rank is not None or asked.energy is not None):
        raise LorakitError('combine: "cat" keeps all ranks; "svd" cuts them.')
    if asked.density is not None and not recipe.sparsify:
        thin = ", ".join(name for name, one in RECIPES.items() if one.sparsify)
        raise LorakitError(f"combine: density was given, and {how} keeps all entries. Those that use it: {thin}.")
    for where, own in {"": asked.weights, **asked.layer_weights}.items():
        if own is None:
            continue
        if len(own) != count or not all(isinstance(w, int | float) and math.isfinite(w) for w in own):
            place = f" for {where!r}" if where else ""
            raise LorakitError(
                f"combine: the weights{place} are {list(own)!r}; one finite number for each of {count} is wanted."
            )
        if recipe.measures and any(w < 0 for w in own):
            raise LorakitError(
                f"combine: {how} is a mean, and the weights {list(own)!r} have a negative one; linear subtracts."
            )
    check(asked, "combine")
    shares = tuple(float(w) for w in asked.weights) if asked.weights is not None else (1 / max(1, count),) * count
    return replace(asked, weights=shares)


def _weights(asked: Combination, place: str) -> Sequence[float]:
    """The weights of the adapters in one layer."""
    own = value_for(asked.layer_weights, place)
    return asked.weights or () if own is None else own


def _findings(
    asked: Combination, given: Sequence[Source], batches: Sequence[Iterable[Batch]] | None
) -> Findings | None:
    """What is measured for the recipe, if it measures anything."""
    live = [one for one in given if isinstance(one, Live)]
    if not asked.recipe.measures:
        if batches is not None:
            measuring = ", ".join(name for name, one in RECIPES.items() if one.measures)
            raise LorakitError(
                f"combine: data were given, and {asked.how} measures nothing. Those that do: {measuring}."
            )
        return None
    if len(live) != len(given):
        raise LorakitError(
            f"combine: {asked.how} measures data through the base model, and folders were given; lk.load them onto it and "
            "combine the adapters; on the command line give --data."
        )
    return Findings(IMPORTANCES[asked.recipe.measures](asked.how), live, batches)


def _check_patterns(asked: Combination, places: Iterable[str]) -> None:
    places = list(places)
    for pattern in asked.layer_weights:
        if not any(value_for({pattern: True}, place) for place in places):
            endings = sorted({place.rpartition(".")[2] for place in places})
            raise LorakitError(
                f"combine: weights are given for {pattern!r}, which ends no adapted layer; they end in: {', '.join(endings)}."
            )


# -- one matrix -------------------------------------------------------------------------------------------------------------


def _one(given: Sequence[Source], place: str, asked: Combination, findings: Findings | None) -> Change | None:
    """The combined change of one matrix; None where no weight counts there."""
    weights, changes, order = [], [], []
    for index, (one, weight) in enumerate(zip(given, _weights(asked, place), strict=True)):
        if weight != 0.0 and (change := one.found(place)) is not None:
            weights.append(weight)
            changes.append(change)
            order.append(index)
    if not changes:
        return None
    check_shapes("combine", place, [(given[i].label, change.shape) for i, change in zip(order, changes, strict=True)])
    recipe = asked.recipe
    if recipe.result == "factors":
        for index, change in zip(order, changes, strict=True):
            if change.rank is None:
                raise LorakitError(
                    f'combine: "cat" lays factors side by side, and {given[index].label} has none for {place}. "linear" '
                    "takes any method and gives whole matrices, or a LoRA where a rank or an energy share is given."
                )
    if findings is not None:
        return _by_findings(given, place, asked, findings)
    if not recipe.sparsify and not recipe.consensus:
        return total(changes, [asked.factor * weight for weight in weights])
    density = DENSITY if asked.density is None else asked.density
    entries = [
        _sparse(change.dense(), recipe, density, f"{asked.seed}/{place}/{index}")
        for index, change in zip(order, changes, strict=True)
    ]
    return Change(asked.factor * _merged(entries, weights, recipe))


def _by_findings(given: Sequence[Source], place: str, asked: Combination, findings: Findings) -> Change:
    """The merge that the data ask for; an adapter that leaves this matrix alone has its say in that too."""
    counted = [
        (one.found(place), found, weight)
        for one, found, weight in zip(given, findings.at(place), _weights(asked, place), strict=True)
        if weight
    ]
    changes, found, weights = zip(*counted, strict=True)
    return findings.importance.merged(changes, found, weights).scaled(asked.factor)


def _sparse(tau: Tensor, recipe: Recipe, density: float, seed: str) -> Tensor:
    """τ with a share of its entries kept, and these rescaled where the recipe says so."""
    if density == 1.0:
        return tau
    if recipe.sparsify == "largest":
        count = max(1, int(density * tau.numel()))
        chosen = tau.abs().flatten().topk(count).indices
        mask = torch.zeros(tau.numel(), dtype=torch.bool, device=tau.device)
        mask[chosen] = True
        mask = mask.reshape(tau.shape)
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        mask = (torch.rand(tau.shape, generator=generator) < density).to(tau.device)
    return torch.where(mask, tau / density if recipe.rescale else tau, 0.0)


def _merged(entries: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """Σ wᵢ τᵢ, by consensus and as a mean where the recipe says so."""
    weighted = [weight * tau for weight, tau in zip(weights, entries, strict=True)]
    whole = torch.stack(weighted).sum(0)
    if not recipe.consensus:
        return whole
    elected = whole.sign()
    result, agreeing = torch.zeros_like(whole), torch.zeros_like(whole)
    for weight, tau in zip(weights, weighted, strict=True):
        agrees = (tau.sign() == elected) & (elected != 0)
        result += torch.where(agrees, tau, 0.0)
        agreeing += abs(weight) * agrees
    return torch.where(agreeing > 0, result / agreeing, 0.0) if recipe.mean else result


# -- biases and whole modules ------------------------------------------------------------------------------------------------


def _replaced(live: Sequence[Live], asked: Combination) -> dict[str, dict[str, Tensor]]:
    """`base + Σ w (own - base)` of every trained bias and saved module; and `b + Σ w Δb` where methods change biases."""
    result: dict[str, dict[str, Tensor]] = {}

    def add(path: str, layer: Adapted, key: str, change: Tensor, weight: float) -> None:
        base = layer.frozen(key)
        held = result.setdefault(path, {}).get(key, base.double())
        result[path][key] = held + asked.factor * weight * change.double()

    for index, one in enumerate(live):
        for path, replacement in one.adapter.replacements():
            layer, weight = one.adapter.layers[path], _weights(asked, path)[index]
            for key, own in replacement.tensors().items():
                if own.is_floating_point():
                    add(path, layer, key, own.detach().double() - layer.frozen(key).double(), weight)
        for place in one.places():
            shift = one.shift(place)
            if shift is None:
                continue
            path, site, delta = one.at[place]
            if site.bias is None:
                raise LorakitError(
                    f"combine: {delta.spec.name} of {one.label!r} adds a bias to {path}, which has none to put the sum in."
                )
            add(path, one.adapter.layers[path], site.bias, shift, _weights(asked, place)[index])
    return result


def _replaced_in_folders(stored: Sequence[Stored], asked: Combination) -> dict[str, Tensor]:
    """Trained biases and saved modules without their base: where every folder has them and the weights add up to 1, the
    base cancels out of `base + Σ w (own - base)`; else refused."""
    result: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for one in stored for key in one.replaced()):
        path = bare(key).rpartition(".")[0]
        weights = [asked.factor * weight for weight in _weights(asked, path)]
        used = [(one, weight) for one, weight in zip(stored, weights, strict=True) if weight]
        lacking = [one.label for one, _ in used if key not in one.replaced()]
        share = sum(weight for _, weight in used)
        if lacking or not math.isclose(share, 1.0, rel_tol=1e-9):
            why = f"{lacking[0]} lacks it" if lacking else f"the weights add up to {share:g}"
            holder = next(one.label for one in stored if key in one.replaced())
            raise LorakitError(
                f"combine: {key} is trained whole in {holder}, and {why}, so that its base value is needed. With the "
                "base model: lk.load both and combine the adapters; on the command line give --base."
            )
        tensors = [one.replaced()[key] for one, _ in used]
        if not tensors[0].is_floating_point():
            result[key] = tensors[0]
            continue
        whole = sum(weight * tensor.double() for tensor, (_, weight) in zip(tensors, used, strict=True))
        assert isinstance(whole, Tensor)
        result[key] = whole.to(tensors[0].dtype)
    return result
