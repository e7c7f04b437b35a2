"""Where changes of matrices go: a new adapter beside the others on a model, or a new folder; with what was lost on the way.

The result is a plain LoRA with a rank per layer, its scale 1 and all of it in the factors; or, where a change has no
factors, whole matrices (`Full`). What was combined, cut or pruned stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.construction import build
from lorakit.algebra.changes import Change, Cut
from lorakit.algebra.sources import WHOLE, Live, Stored, frozen
from lorakit.core.delta import Method
from lorakit.core.walking import as_patterns, walk
from lorakit.errors import LorakitError
from lorakit.files.bundle import CONTENT, own_data, write_bundle
from lorakit.files.folder import replace_folder
from lorakit.files.interchange import COMMON, PREFIX
from lorakit.methods import Full, LoRA


@dataclass(frozen=True)
class Made:
    """What came of an operation on adapters.

    Attributes:
        ranks: place -> its rank now; None where the change is held whole.
        errors: place -> ‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm, of what was asked for and what came out.
        error: the same over all layers together.
        adapter: the new adapter, or None where a folder was written.
        folder: that folder.
    """

    ranks: dict[str, int | None]
    errors: dict[str, float]
    error: float
    adapter: Adapter | None = None
    folder: Path | None = None

    def record(self) -> dict[str, Any]:
        """For lorakit.json and the model card."""
        worst = max(self.errors, key=lambda place: self.errors[place])
        return {"error": self.error, "worst": {"layer": worst, "error": self.errors[worst]}}


def made(cuts: Mapping[str, Cut], adapter: Adapter | None = None, folder: Path | None = None) -> Made:
    """The report of these cuts."""
    size = math.sqrt(sum(cut.size**2 for cut in cuts.values()))
    lost = math.sqrt(sum(cut.lost**2 for cut in cuts.values()))
    return Made(
        ranks={place: cut.change.rank for place, cut in cuts.items()},
        errors={place: cut.error for place, cut in cuts.items()},
        error=lost / size if size else 0.0,
        adapter=adapter,
        folder=folder,
    )


def method_for(cuts: Mapping[str, Cut]) -> tuple[Method, dict[str, Any]]:
    """The spec that holds these changes, and the patterns that give each place the rank that it has."""
    ranks = {place: cut.change.rank for place, cut in cuts.items()}
    if any(rank is None for rank in ranks.values()):
        return Full(), {}
    common, exact = as_patterns({place: rank for place, rank in ranks.items() if rank is not None})
    alphas = {place: float(rank) for place, rank in exact.items()}
    return LoRA(rank=common, alpha=float(common)), {"rank": exact, "alpha": alphas}


# -- on a model ------------------------------------------------------------------------------------------------------------

Replaced = Mapping[str, Mapping[str, Tensor]]
"""Path -> tensor name -> value: trained biases and modules_to_save of the result."""


def beside(given: Sequence[Live], name: str, cuts: Mapping[str, Cut], replaced: Replaced) -> Made:
    """A new adapter of these changes on the model of the adapters that they came from."""
    adapters = [one.adapter for one in given]
    model = adapters[0].model
    at = {place: path for one in given for place, (path, _, _) in one.at.items()}
    wanted = {at[place] for place in cuts}
    spec, patterns = method_for(cuts)
    asked = [adapter.targets.bias for adapter in adapters]
    adapted_biases = any(path in wanted for path in replaced)
    targets = dataclasses.replace(
        adapters[0].targets,
        target_modules=tuple(path for path, _ in walk(model) if path in wanted),
        exclude_modules=None,
        layers=None,
        layers_pattern=None,
        modules_to_save=tuple(dict.fromkeys(path for adapter in adapters for path in adapter.saved)),
        bias="all" if "all" in asked else "lora_only" if adapted_biases else "none",
        parts={layer: parts for adapter in adapters for layer, parts in adapter.targets.parts.items()},
        patterns=patterns,
    )
    paths = [path for path, _ in walk(model) if path in wanted]
    result = build(model, spec, targets, name, checked=False, paths=paths)
    with torch.no_grad():
        for path, site, delta in result.deltas():
            place = site.place(path)
            if place not in cuts:  # another part of a layer that has parts, which none of them changes
                delta.requires_grad_(False).apply(_zero)
                continue
            change = cuts[place].change
            for letter, value in (
                (("B", change.B), ("A", change.A)) if isinstance(spec, LoRA) else (("P", change.dense()),)
            ):
                getattr(delta, letter).copy_(value)
        for path, replacement in result.replacements():
            for key, tensor in replacement.tensors().items():
                tensor.copy_(replaced.get(path, {}).get(key, frozen(result.layers[path], key)))
    return made(cuts, adapter=result)


def _zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.zero_()


# -- in a folder -----------------------------------------------------------------------------------------------------------


def in_folder(
    given: Sequence[Stored],
    output: str | Path,
    cuts: Mapping[str, Cut],
    others: Mapping[str, Tensor],
    record: Mapping[str, Any],
    verb: str,
) -> Made:
    """A new folder of these changes: PEFT's two files, and lorakit.json where the first folder has one.

    Args:
        given: what they came from; the first one's base, task and the like are kept.
        output: the folder to write.
        cuts: place -> the change.
        others: tensors to write as they are (biases, modules_to_save).
        record: what was done, for lorakit.json.
        verb: for messages.
    """
    target = Path(output).expanduser()
    for one in given:
        if target.resolve() == one.bundle.folder.resolve():
            raise LorakitError(f"{verb}: {output} is one of the adapters itself; choose another folder to write.")
    spec, patterns = method_for(cuts)
    named = {f"{option}_pattern": patterns.get(option, {}) for option in ("rank", "alpha")}
    tensors, whole = dict(others), isinstance(spec, Full)
    for place, cut in cuts.items():
        tensors.update(_packed(given, place, cut.change, whole))
    first = given[0].bundle
    config = {key: value for key, value in first.config.items() if key in COMMON}
    config |= {**spec.peft_config(), **named, "peft_type": "FULL" if whole else "LORA"}
    config["target_modules"] = _union(given, "target_modules", cuts)
    for option in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if config["target_modules"] != first.config.get("target_modules"):
            config[option] = None
    saved = dict.fromkeys(name for one in given for name in one.bundle.config.get("modules_to_save") or ())
    config["modules_to_save"] = list(saved) or None
    own = dict(first.own)
    if own or whole:
        own = _own(given, own, spec, config, named, set(cuts), record)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    replace_folder(target, lambda fresh: write_bundle(fresh, config, tensors, own or None), CONTENT)
    return made(cuts, folder=target)


def _packed(given: Sequence[Stored], place: str, change: Change, whole: bool) -> dict[str, Tensor]:
    """One matrix's tensors under PEFT's names, in the shapes and the precision that the file has for this layer."""
    one = next(one for one in given if place in one.places())
    if (
        place in one.wholes
    ):  # a result in factors is a linear layer's: this format has the matrix and not the layer's kind
        held = one.bundle.tensors[one.wholes[place]]
        key_A, key_B = f"{PREFIX}{place}.lora_A.weight", f"{PREFIX}{place}.lora_B.weight"
        shape_A, shape_B = held.shape[1:], (held.shape[0], -1)
    else:
        key_A, key_B = one.pairs[place]
        held, B = one.bundle.tensors[key_A], one.bundle.tensors[key_B]
        shape_A, shape_B = held.shape[1:], (B.shape[0], -1, *B.shape[2:])
    if whole or change.A is None:
        return {f"{PREFIX}{place}{WHOLE}": change.dense().to(held.dtype)}
    return {
        key_A: change.A.reshape(-1, *shape_A).to(held.dtype),
        key_B: change.B.reshape(shape_B).to(held.dtype),
    }


def _union(given: Sequence[Stored], option: str, cuts: Mapping[str, Cut]) -> Any:
    """The first folder's request where all ask for the same and nothing was left out; else every layer by its name."""
    asked = [one.bundle.config.get(option) for one in given]
    first = set(given[0].places())
    same = all(_sorted(value) == _sorted(asked[0]) for value in asked)
    return asked[0] if same and set(cuts) == first else sorted({place.partition(".base_layer.")[0] for place in cuts})


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _own(
    given: Sequence[Stored],
    own: dict[str, Any],
    spec: Method,
    config: Mapping[str, Any],
    patterns: Mapping[str, Any],
    places: set[str],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """lorakit.json of the result; empty where PEFT's two files alone say it."""
    targets = {
        key: value
        for key, value in own.get("targets", {}).items()
        if key == "layers_pattern" or not key.endswith("_pattern")
    }
    if targets.get("parts") and not isinstance(spec, Full):
        return {}  # parts of a fused layer are one pair in the file, and after this no longer apart: a plain LoRA of it
    if not targets:
        targets = {
            "exclude_modules": None,
            "layers": None,
            "layers_pattern": None,
            "bias": config.get("bias", "none"),
            "modules_to_save": list(config.get("modules_to_save") or ()),
        }
    targets["parts"] = {}
    if not own or config["target_modules"] != given[0].bundle.config.get("target_modules"):
        targets |= {"target_modules": config["target_modules"], "exclude_modules": None, "layers": None}
        targets["layers_pattern"] = None
    targets["modules_to_save"] = list(config.get("modules_to_save") or ())
    targets |= {name: list(values.items()) for name, values in patterns.items()}
    prints = [one.base()["fingerprint"] for one in given]
    same = places == set(given[0].places()) and all(
        one and prints[0] and one["shapes"] == prints[0]["shapes"] for one in prints
    )
    # a fingerprint is over the adapted layers: it is the result's only where these are the same
    base = {"name": config.get("base_model_name_or_path"), "fingerprint": prints[0] if same else None}
    return own_data(spec.to_dict(), targets, base, {**own.get("record", {}), **record})
