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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.algebra.changes import Change, Cut, cut, kept, total
from lorakit.algebra.importance import IMPORTANCES, Findings
from lorakit.algebra.outcome import Made, beside, in_folder, made
from lorakit.algebra.sources import Live, Source, Stored, check_bases, frozen, sources
from lorakit.core.spectrum import check_request
from lorakit.core.walking import value_for
from lorakit.errors import LorakitError, unknown
from lorakit.files.interchange import bare
from lorakit.init.calibration import Batch


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        sparsify: which entries of each change stay: "" all, "largest", or "random".
        rescale: divide what stays by the density.
        consensus: leave out entries whose sign is not the elected one.
        mean: divide by the weights of those that agreed.
        measures: what data are measured for, to weigh the changes by ("inputs", "gradients"); "" nothing.
        result: "any"; "factors", which must all be there; or "cut" to a rank or an energy share.
        text: for the command line, in one line.
    """

    sparsify: str = ""
    rescale: bool = False
    consensus: bool = False
    mean: bool = False
    measures: str = ""
    result: str = "any"
    text: str = ""


RECIPES: dict[str, Recipe] = {
    "linear": Recipe(text="the weighted sum of what they add, exactly; negative weights subtract"),
    "cat": Recipe(result="factors", text="the same as factors side by side, at the sum of the ranks"),
    "svd": Recipe(result="cut", text="the same, cut to a rank or to a share of its energy"),
    "ties": Recipe(
        "largest", consensus=True, mean=True, text="largest entries, one elected sign, mean of those that agree"
    ),
    "dare-linear": Recipe("random", rescale=True, text="random entries, rescaled, summed"),
    "dare-ties": Recipe(
        "random", True, True, True, text="random entries, rescaled, one elected sign, mean of those that agree"
    ),
    "magnitude-prune": Recipe("largest", text="largest entries, summed"),
    "regmean": Recipe(measures="inputs", text="whose outputs differ least from each one's, on inputs of its own data"),
    "fisher": Recipe(
        measures="gradients", text="the mean, entry by entry weighed by squared gradients on its own data"
    ),
}

DENSITY = 0.2
"""The share of entries that TIES keeps in its paper."""


@dataclass(frozen=True)
class _Plan:
    """What was asked for, checked."""

    recipe: Recipe
    weights: tuple[float, ...]
    layer_weights: Mapping[str, Sequence[float]]
    density: float
    factor: float
    seed: int

    def at(self, place: str) -> Sequence[float]:
        own = value_for(self.layer_weights, place)
        return self.weights if own is None else own


def combine(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    how: str = "linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    factor: float = 1.0,
    layer_weights: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    batches: Sequence[Iterable[Batch]] | None = None,
    name: str = "combined",
    output: str | Path | None = None,
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
        rank: cut the result to this rank per layer.
        energy: instead, to the least rank that keeps this share of each layer's squared singular values.
        density: the share of entries to keep, for the recipes that leave some out; 0.2 by default.
        factor: λ, times everything.
        layer_weights: {pattern: weights} for layers whose name the pattern ends; the first match counts.
        seed: of DARE's random entries. The same for a layer whatever other layers there are.
        batches: for the recipes that measure ("regmean", "fisher"): for each adapter a list of batches of its own data, each
            the arguments of one `model(**batch)`; with labels for "fisher".
        name: of the new adapter on the model.
        output: the folder to write, for folders.

    Raises:
        LorakitError: the request makes no sense or cannot be met; nothing has changed or been written then.
    """
    plan = _checked(len(adapters), weights, how, rank, energy, density, factor, layer_weights, seed)
    given = sources(adapters, "combine")
    findings = _findings(plan, how, given, batches)
    places = list(dict.fromkeys(place for one in given for place in one.places()))
    _check_patterns(plan, places)
    live = [one for one in given if isinstance(one, Live)]
    stored = [one for one in given if isinstance(one, Stored)]
    if stored:
        if output is None:
            raise LorakitError("combine: folders were given, so output= names the folder to write.")
        check_bases(stored, "combine")
        others = _others(stored, plan)
    elif output is not None:
        raise LorakitError(
            "combine: adapters on a model give an adapter on the model; save that, and leave output out."
        )
    else:
        replaced = _replaced(live, plan)
    cuts: dict[str, Cut] = {}
    for place in places:
        found = _one(given, place, plan, findings)
        if found is not None:
            cuts[place] = cut(found, rank, energy) if rank is not None or energy is not None else kept(found)
    if not cuts:
        raise LorakitError("combine: every weight is zero, so that nothing would be left.")
    if stored:
        assert output is not None
        record = {
            "combined": {
                "from": [one.label for one in stored],
                "weights": list(plan.weights),
                "how": how,
                "error": made(cuts).error,
            }
        }
        return in_folder(stored, output, cuts, others, record, "combine")
    return beside(live, name, cuts, replaced)


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
        factor: 0.5 halves its effect, -1 turns it round.
        rank, energy: cut the result, as in `combine`.
        name: of the new adapter; the old one's with "-scaled" by default.
        output: the folder to write, for a folder.

    Raises:
        LorakitError: as `combine`; nothing has changed or been written then.
    """
    if isinstance(adapter, Adapter):
        name = name or f"{adapter.name}-scaled"
    return combine([adapter], [factor], rank=rank, energy=energy, name=name or "scaled", output=output)


# -- what was asked ---------------------------------------------------------------------------------------------------------


def _checked(
    count: int,
    weights: Sequence[float] | None,
    how: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
    factor: float,
    layer_weights: Mapping[str, Sequence[float]] | None,
    seed: int,
) -> _Plan:
    if how not in RECIPES:
        raise unknown("way to combine", how, RECIPES)
    recipe = RECIPES[how]
    check_request(rank, energy, "combine", needed=recipe.result == "cut")
    if recipe.result == "factors" and (rank is not None or energy is not None):
        raise LorakitError('combine: "cat" keeps all ranks; to cut them give how="svd".')
    if density is not None and not recipe.sparsify:
        thin = ", ".join(name for name, one in RECIPES.items() if one.sparsify)
        raise LorakitError(f"combine: density was given, and {how} keeps all entries. Those that use it: {thin}.")
    if density is not None and not 0 < density <= 1:
        raise LorakitError(f"combine: density was given as {density!r}; it is a share above 0 and at most 1.")
    for where, own in {"": weights, **(layer_weights or {})}.items():
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
    if not math.isfinite(factor):
        raise LorakitError(f"combine: factor was given as {factor!r}; it is a finite number.")
    return _Plan(
        recipe=recipe,
        weights=tuple(float(w) for w in weights) if weights is not None else (1 / max(1, count),) * count,
        layer_weights=dict(layer_weights or {}),
        density=DENSITY if density is None else density,
        factor=float(factor),
        seed=seed,
    )


def _findings(
    plan: _Plan, how: str, given: Sequence[Source], batches: Sequence[Iterable[Batch]] | None
) -> Findings | None:
    """What is measured for the recipe, if it measures anything."""
    live = [one for one in given if isinstance(one, Live)]
    if not plan.recipe.measures:
        if batches is not None:
            measuring = ", ".join(name for name, one in RECIPES.items() if one.measures)
            raise LorakitError(f"combine: batches were given, and {how} measures nothing. Those that do: {measuring}.")
        return None
    if len(live) != len(given):
        raise LorakitError(
            f"combine: {how} measures data through the base model, and folders were given; lk.load them onto it and combine "
            "the adapters; on the command line give --data."
        )
    return Findings(IMPORTANCES[plan.recipe.measures](how), live, batches)


def _check_patterns(plan: _Plan, places: Iterable[str]) -> None:
    places = list(places)
    for pattern in plan.layer_weights:
        if not any(value_for({pattern: True}, place) for place in places):
            endings = sorted({place.rpartition(".")[2] for place in places})
            raise LorakitError(
                f"combine: layer_weights names {pattern!r}, which ends no adapted layer; they end in: {', '.join(endings)}."
            )


# -- one matrix -------------------------------------------------------------------------------------------------------------


def _one(given: Sequence[Source], place: str, plan: _Plan, findings: Findings | None) -> Change | None:
    """The combined change of one matrix; None where no weight counts there."""
    weights, changes, order = [], [], []
    for index, (one, weight) in enumerate(zip(given, plan.at(place), strict=True)):
        if weight != 0.0 and place in one.places():
            weights.append(weight)
            changes.append(one.change(place))
            order.append(index)
    if not changes:
        return None
    shapes = {change.shape for change in changes}
    if len(shapes) > 1:
        raise LorakitError(
            f"combine: {place} is {' and '.join(f'{out} × {in_}' for out, in_ in sorted(shapes))} in different adapters, so "
            "they are for different base models."
        )
    recipe = plan.recipe
    if recipe.result == "factors":
        for index, change in zip(order, changes, strict=True):
            if change.rank is None:
                raise LorakitError(
                    f'combine: "cat" lays factors side by side, and {given[index].label} has none for {place}. how="linear" '
                    "takes any method and gives whole matrices, with rank= or energy= a LoRA."
                )
    if findings is not None:
        return _by_findings(given, place, plan, findings)
    if not recipe.sparsify and not recipe.consensus:
        return total(changes, [plan.factor * weight for weight in weights])
    entries = [
        _sparse(change.dense(), recipe, plan.density, f"{plan.seed}/{place}/{index}")
        for index, change in zip(order, changes, strict=True)
    ]
    return Change(plan.factor * _merged(entries, weights, recipe))


def _by_findings(given: Sequence[Source], place: str, plan: _Plan, findings: Findings) -> Change:
    """The merge that the data ask for; an adapter that leaves this matrix alone has its say in that too."""
    counted = [
        (one.change(place) if place in one.places() else None, found, weight)
        for one, found, weight in zip(given, findings.at(place), plan.at(place), strict=True)
        if weight
    ]
    changes, found, weights = zip(*counted, strict=True)
    return findings.importance.merged(changes, found, weights).scaled(plan.factor)


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


def _replaced(live: Sequence[Live], plan: _Plan) -> dict[str, dict[str, Tensor]]:
    """`base + Σ w (own - base)` of every trained bias and saved module; and `b + Σ w Δb` where methods change biases."""
    result: dict[str, dict[str, Tensor]] = {}

    def add(path: str, layer: object, key: str, change: Tensor, weight: float) -> None:
        base = frozen(layer, key)
        held = result.setdefault(path, {}).get(key, base.double())
        result[path][key] = held + plan.factor * weight * change.double()

    for index, one in enumerate(live):
        for path, replacement in one.adapter.replacements():
            layer, weight = one.adapter.layers[path], plan.at(path)[index]
            for key, own in replacement.tensors().items():
                if own.is_floating_point():
                    add(path, layer, key, own.detach().double() - frozen(layer, key).double(), weight)
        for place in one.places():
            shift = one.shift(place)
            if shift is None:
                continue
            path, site, delta = one.at[place]
            if site.bias is None:
                raise LorakitError(
                    f"combine: {delta.spec.name} of {one.label!r} adds a bias to {path}, which has none to put the sum in."
                )
            add(path, one.adapter.layers[path], site.bias, shift, plan.at(place)[index])
    return result


def _others(stored: Sequence[Stored], plan: _Plan) -> dict[str, Tensor]:
    """Trained biases and saved modules without their base: where every folder has them and the weights add up to 1, the
    base cancels out of `base + Σ w (own - base)`; else refused."""
    result: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for one in stored for key in one.others):
        path = bare(key).rpartition(".")[0]
        weights = [plan.factor * weight for weight in plan.at(path)]
        used = [(one, weight) for one, weight in zip(stored, weights, strict=True) if weight]
        lacking = [one.label for one, _ in used if key not in one.others]
        share = sum(weight for _, weight in used)
        if lacking or not math.isclose(share, 1.0, rel_tol=1e-9):
            why = f"{lacking[0]} lacks it" if lacking else f"the weights add up to {share:g}"
            holder = next(one.label for one in stored if key in one.others)
            raise LorakitError(
                f"combine: {key} is trained whole in {holder}, and {why}, so that "
                "its base value is needed. With the base model: lk.load both and combine the adapters; on the command line "
                "give --base."
            )
        tensors = [one.others[key] for one, _ in used]
        if not tensors[0].is_floating_point():
            result[key] = tensors[0]
            continue
        whole = sum(weight * tensor.double() for tensor, (_, weight) in zip(tensors, used, strict=True))
        assert isinstance(whole, Tensor)
        result[key] = whole.to(tensors[0].dtype)
    return result
