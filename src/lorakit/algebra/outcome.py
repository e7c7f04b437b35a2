"""Where changes of matrices go: a new adapter beside the others on a model, or a new folder; with what was lost on the way.

The result is a plain LoRA with a rank per layer, its scale 1 and all of it in the factors; or, where a change has no
factors, whole matrices (`Full`). What was combined, cut or pruned stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.construction import build
from lorakit.algebra.changes import Change, Cut
from lorakit.algebra.sources import Live, Source, Stored
from lorakit.core.delta import Method
from lorakit.core.stacks import stacked_sites
from lorakit.core.walking import as_patterns, has_suffix, walk
from lorakit.errors import LorakitError
from lorakit.files.bundle import content_with, own_data, write_bundle
from lorakit.files.folder import replace_folder
from lorakit.files.formats import entries_of
from lorakit.files.interchange import COMMON, PREFIX, asked_targets
from lorakit.files.pairs import WHOLE
from lorakit.files.prompt import common_prompt, read_prompt
from lorakit.files.stacked import MARKER, StackedPair
from lorakit.methods import Full, LoRA


@dataclass(frozen=True)
class Made:
    """What came of an operation on adapters.

    Attributes:
        ranks: place -> its rank now; None where the change is held whole.
        errors: place -> ‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm, of what was asked for and what came out.
        error: the same over all layers together.
        record: what was done and what it cost, for lorakit.json and the model card.
        adapter: the new adapter, or None where a folder was written.
        folder: that folder.
    """

    ranks: dict[str, int | None]
    errors: dict[str, float]
    error: float
    record: dict[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None
    folder: Path | None = None

    @property
    def worst(self) -> str:
        """The place of the largest error."""
        return max(self.errors, key=lambda place: self.errors[place])


def report(cuts: Mapping[str, Cut], done: str, what: Mapping[str, Any], gone: Mapping[str, Cut] | None = None) -> Made:
    """The report of these cuts, and of places that are gone; `done` and `what` are for the record."""
    counted = {**cuts, **(gone or {})}
    size = math.sqrt(sum(cut.size**2 for cut in counted.values()))
    lost = math.sqrt(sum(cut.lost**2 for cut in counted.values()))
    found = Made(
        ranks={place: cut.change.rank for place, cut in cuts.items()},
        errors={place: cut.error for place, cut in counted.items()},
        error=lost / size if size else 0.0,
    )
    if counted:
        what = {**what, "error": found.error, "worst": {"layer": found.worst, "error": found.errors[found.worst]}}
    return dataclasses.replace(found, record={done: what})


def method_for(cuts: Mapping[str, Cut]) -> tuple[Method, dict[str, Any]]:
    """The spec that holds these changes, and the patterns that give each place the rank that it has."""
    return _method_of({place: cut.change.rank for place, cut in cuts.items()})


def _method_of(ranks: Mapping[str, int | None]) -> tuple[Method, dict[str, Any]]:
    if any(rank is None for rank in ranks.values()):
        return Full(), {}
    common, exact = as_patterns({place: rank for place, rank in ranks.items() if rank is not None})
    alphas = {place: float(rank) for place, rank in exact.items()}
    return LoRA(rank=common, alpha=float(common)), {"rank": exact, "alpha": alphas}


def make(
    given: Sequence[Source],
    cuts: Mapping[str, Cut],
    others: Mapping[str, Any],
    *,
    name: str,
    output: str | Path | None,
    done: str,
    what: Mapping[str, Any],
    gone: Mapping[str, Cut] | None = None,
) -> Made:
    """The changes as an adapter: on the model that they came from, or in a folder if they came from folders.

    Args:
        given: what they came from.
        cuts: place -> the change.
        others: trained biases and modules_to_save of the result, as `Source.replaced` has them.
        name: of an adapter on a model.
        output: the folder to write.
        done: what was done, in one word for the record ("resized").
        what: how it was done, for the record.
        gone: place -> what was left out whole there; counted in the error.
    """
    labels = [one.label for one in given]
    told = report(cuts, done, {"from": labels if len(labels) > 1 else labels[0], **what}, gone)
    if output is None:
        return dataclasses.replace(told, adapter=_on_model(cast(Sequence[Live], given), name, cuts, others))
    folder = _in_folder(cast(Sequence[Stored], given), Path(output).expanduser(), cuts, others, told.record)
    return dataclasses.replace(told, folder=folder)


# -- on a model ------------------------------------------------------------------------------------------------------------


def _on_model(
    given: Sequence[Live], name: str, cuts: Mapping[str, Cut], replaced: Mapping[str, Mapping[str, Tensor]]
) -> Adapter:
    """A new adapter of these changes on the model of the adapters that they came from; `replaced` is path -> tensor name ->
    value of its trained biases and modules_to_save."""
    adapters = [one.adapter for one in given]
    model = adapters[0].model
    at = {place: path for one in given for place, (path, _, _) in one.at.items()}
    wanted = {at[place] for place in cuts}
    paths = [path for path, _ in walk(model) if path in wanted]
    spec, patterns = method_for(cuts)
    adapted_biases = any(path in wanted for path in replaced)
    targets = dataclasses.replace(
        adapters[0].targets,
        target_modules=tuple(name for path in paths for name in _names_at(adapters, path, cuts)),
        exclude_modules=None,
        layers=None,
        layers_pattern=None,
        modules_to_save=tuple(dict.fromkeys(path for adapter in adapters for path in adapter.saved)),
        bias="all" if any(one.targets.bias == "all" for one in adapters) else "lora_only" if adapted_biases else "none",
        parts={layer: parts for adapter in adapters for layer, parts in adapter.targets.parts.items()},
        patterns=patterns,
        trainable_tokens={},  # they are among the changes
        ensure_weight_tying=False,  # what they have in common is written out for each
    )
    result = build(model, spec, targets, name, checked=False, paths=paths)
    result.prompt = common_prompt(adapter.prompt for adapter in adapters)
    with torch.no_grad():
        for path, site, delta in result.deltas():
            place = site.place(path)
            if place not in cuts:  # another part of a layer that has parts, which none of them changes
                delta.requires_grad_(False)
                for parameter in delta.parameters():
                    parameter.zero_()
                continue
            change = cuts[place].change
            values = {"B": change.B, "A": change.A} if isinstance(spec, LoRA) else {"P": change.dense()}
            for letter, value in values.items():
                getattr(delta, letter).copy_(value)
        for path, replacement in result.replacements():
            for key, tensor in replacement.tensors().items():
                tensor.copy_(replaced.get(path, {}).get(key, result.layers[path].frozen(key)))
    return result


def _names_at(adapters: Sequence[Adapter], path: str, cuts: Mapping[str, Cut]) -> list[str]:
    """What to ask for at a layer: it; or, where it multiplies matrices by itself and only some have a change, these."""
    layer = next(one.layers[path] for one in adapters if path in one.layers)
    own = stacked_sites(layer.base)
    places = [place for site in own if (place := site.place(path)) in cuts]
    return places if len(places) < len(own) else [path]


# -- in a folder -----------------------------------------------------------------------------------------------------------


def _in_folder(
    given: Sequence[Stored],
    target: Path,
    cuts: Mapping[str, Cut],
    others: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> Path:
    """A new folder of these changes: PEFT's two files, and lorakit.json where the first folder has one, whose base, task and
    the like are kept. `others` are tensors to write as they are."""
    stacks = _stacks(given, cuts)
    spec, patterns = _method_of(_ranks(cuts, stacks))
    named = {f"{option}_pattern": patterns.get(option, {}) for option in ("rank", "alpha")}
    tensors, whole = dict(others), isinstance(spec, Full)
    inside = {place for _, experts in stacks for place in experts.values()}
    for place in [place for place in cuts if place not in inside]:
        tensors.update(_packed(given, place, cuts[place].change, whole))
    modules = [stack.module for stack, _ in stacks]
    for number, (stack, experts) in enumerate(stacks):
        changes = {index: cuts[place].change for index, place in experts.items()}
        tensors.update(_stacked(given, stack, changes, modules[number + 1 :].count(stack.module)))
    first = given[0].bundle
    config = {key: value for key, value in first.config.items() if key in COMMON}
    config |= entries_of(spec) | named
    config["target_modules"] = _targets(given, cuts, inside)
    if config["target_modules"] != first.config.get("target_modules"):
        config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    saved = dict.fromkeys(name for one in given for name in one.bundle.config.get("modules_to_save") or ())
    config["modules_to_save"] = list(saved) or None
    if stacks:
        config |= {"target_parameters": _parameters(given, stacks), **({} if first.own else MARKER)}
    own: dict[str, Any] = {}
    if first.own or whole:
        own = _own(given, spec, config, named, set(cuts), record)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    prompt = common_prompt(read_prompt(one.bundle.folder) for one in given)
    replace_folder(
        target, lambda fresh: write_bundle(fresh, config, tensors, own or None, prompt), content_with(prompt)
    )
    return target


def _stacks(given: Sequence[Stored], cuts: Mapping[str, Cut]) -> list[tuple[StackedPair, dict[int, str]]]:
    """The stacks of the result, each with the places of its experts that have a change."""
    found = []
    for stack in {place: stack for one in reversed(given) for place, stack in one.stacks.items()}.values():
        experts = {index: name for index in range(stack.count) if (name := stack.expert(index)) in cuts}
        if not experts:
            continue
        whole = next((name for name in experts.values() if cuts[name].change.rank is None), None)
        if whole is not None:
            raise LorakitError(
                f"{whole} has no factors in the result, and without the base model it is not known how this expert's whole "
                "matrix lies. Give rank or energy; or lk.load the adapters and combine them on their model (--base)."
            )
        found.append((stack, experts))
    return found


def _ranks(cuts: Mapping[str, Cut], stacks: Sequence[tuple[StackedPair, Mapping[int, str]]]) -> dict[str, int | None]:
    """The rank of every layer and of every stack, whose experts all have the largest of them in the file."""
    ranks = {place: cut.change.rank for place, cut in cuts.items()}
    for stack, experts in stacks:
        ranks[stack.place] = max(cast(int, ranks.pop(place)) for place in experts.values())
    return ranks


def _stacked(
    given: Sequence[Stored], stack: StackedPair, changes: Mapping[int, Change], depth: int
) -> dict[str, Tensor]:
    """A stack's tensors as the file has them, within `depth` other stacks of its module."""
    one = next(one for one in given if stack.place in one.stacks)
    dtype = one.bundle.tensors[one.pairs[stack.expert(0)][0]].dtype
    pairs = {index: (cast(Tensor, change.A).to(dtype), change.B.to(dtype)) for index, change in changes.items()}
    return stack.join(pairs, max(len(A) for A, _ in pairs.values()), depth)


def _parameters(given: Sequence[Stored], stacks: Iterable[tuple[StackedPair, Any]]) -> list[str]:
    """target_parameters of the result: the stacks that are left, and parameters that are one matrix."""
    known = [place for one in given for place in one.stacks]
    asked = [name for one in given for name in one.bundle.config.get("target_parameters") or ()]
    others = [name for name in asked if not any(has_suffix(place, name) for place in known)]
    return [*(stack.place for stack, _ in stacks), *dict.fromkeys(others)]


def _packed(given: Sequence[Stored], place: str, change: Change, whole: bool) -> dict[str, Tensor]:
    """One matrix's tensors under PEFT's names, in the shapes and the precision that the file has for this layer."""
    one = next(one for one in given if place in one.places())
    if place in one.wholes:  # factors of it are a linear layer's: this format has the matrix and not the layer's kind
        key_A, key_B = f"{PREFIX}{place}.lora_A.weight", f"{PREFIX}{place}.lora_B.weight"
        held = one.bundle.tensors[one.wholes[place]]
        shape_B: tuple[int, ...] = (held.shape[0], -1)
    else:
        key_A, key_B = one.pairs[place]
        held, B = one.bundle.tensors[key_A], one.bundle.tensors[key_B]
        shape_B = (B.shape[0], -1, *B.shape[2:])
    if whole or change.A is None:
        return {f"{PREFIX}{place}{WHOLE}": change.dense().to(held.dtype)}
    return {
        key_A: change.A.reshape(-1, *held.shape[1:]).to(held.dtype),
        key_B: change.B.reshape(shape_B).to(held.dtype),
    }


def _same_places(given: Sequence[Stored], places: Iterable[str]) -> bool:
    return set(places) == set(given[0].places())


def _targets(given: Sequence[Stored], cuts: Mapping[str, Cut], inside: Collection[str]) -> Any:
    """The first folder's request where all ask for the same and nothing was left out; else every layer by its name, without
    the experts `inside` stacks."""
    asked = [one.bundle.config.get("target_modules") for one in given]
    alike = [sorted(value) if isinstance(value, list) else value for value in asked]
    if _same_places(given, cuts) and all(value == alike[0] for value in alike):
        return asked[0]
    return sorted({place.partition(".base_layer.")[0] for place in cuts if place not in inside})


def _own(
    given: Sequence[Stored],
    spec: Method,
    config: Mapping[str, Any],
    patterns: Mapping[str, Any],
    places: set[str],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """lorakit.json of the result; empty where PEFT's two files alone say it."""
    own = given[0].bundle.own
    everywhere = {"exclude_modules": None, "layers": None, "layers_pattern": None}
    asked = own.get("targets") or {**everywhere, "bias": config.get("bias", "none")}
    targets = {key: asked[key] for key in asked if key == "layers_pattern" or not key.endswith("_pattern")}
    if targets.get("parts") and not isinstance(spec, Full):
        return {}  # parts of a fused layer are one pair in the file, and after this no longer apart: a plain LoRA of it
    if (
        not own
        or not _same_places(given, places)
        or config["target_modules"] != given[0].bundle.config.get("target_modules")
    ):
        named = asked_targets(config["target_modules"], config.get("target_parameters") or ())
        targets |= {"target_modules": named if isinstance(named, str) else list(named), **everywhere}
    targets |= {"parts": {}, "modules_to_save": list(config.get("modules_to_save") or ())}
    targets |= {name: list(values.items()) for name, values in patterns.items()}
    prints = [one.base()["fingerprint"] for one in given]
    same = _same_places(given, places) and all(
        one and prints[0] and one["shapes"] == prints[0]["shapes"] for one in prints
    )
    # a fingerprint is over the adapted layers: it is the result's only where these are the same
    base = {"name": config.get("base_model_name_or_path"), "fingerprint": prints[0] if same else None}
    return own_data(spec.to_dict(), targets, base, {**own.get("record", {}), **record})
