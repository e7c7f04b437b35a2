"""Which base model an adapter was made for, told by a small sample of its weights.

An adapter on another base gives plausible nonsense, so the base is checked and not believed by name. The sample is a
few numbers of every adapted layer, kept to bfloat16's precision: the same model in float32, float16 or bfloat16 agrees,
a further fine-tuned one does not. A quantised base is told by the correlation of its sample with that of its floats.

An adapter that was trained on a quantised base answers what that base computes. On the floats, or on another quantised
copy, it acts on other weights: usually near enough, and everybody does it, so that is logged and not refused. Where the
start put the weights there itself (LoftQ), it is refused.

The same weights compute something else under other settings (scaled rotary positions, a window of attention, another
activation). Those that an adapter was trained with are kept too, and a difference is logged: it may be meant, as where a
context is extended afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.targets import Targets, select
from lorakit.core.sites import sites_of
from lorakit.core.storage import storage_of
from lorakit.core.walking import walk
from lorakit.files.interchange import gathered, plain_names, unwrapped

log = logging.getLogger("lorakit")

SAMPLES = 512
"""Numbers kept in all."""

DIFFERING = 0.02
"""The share of sampled weights that may differ by more than rounding, in one and the same base."""

LIKENESS = 0.85
"""The least cosine between samples of one model held in two ways. Four bits give 0.995, two bits 0.95, two models 0."""


_ACTS = re.compile(
    r"rope|rotary|alibi|window|sliding|layer_types|act$|act_fn|activation|eps$|epsilon|cap(ping)?$|multiplier|scal(e|ing)|"
    r"clip|top_?k_|topk|per_tok|heads$|n_head|causal|is_decoder"
)
"""Names of settings that change what the same weights compute."""
_ACTS_NOT = re.compile(r"init|drop|loss|quantization|gradient|task_specific|rescale")
"""Names among them that only concern the start, training or storage."""


@dataclass(frozen=True)
class Weight:
    """One weight of the base: its name and shape, how it is held, and what reads it (a quantised one is unpacked then)."""

    name: str
    shape: tuple[int, ...]
    storage: str
    read: Callable[[], Tensor]


def _sample(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # whole numbers: a float has no exact place in a weight of more than 2²⁴ entries
    index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
    return flat[index].float().cpu()


def _plain_weight(layer: nn.Module, path: str, name: str) -> Weight:
    site = sites_of(layer)[0]
    storage = storage_of(layer, site.weight, path)
    shape = (site.layout.shape.out, site.layout.shape.in_)
    matrix = site.layout.matrix
    return Weight(
        f"{name}.{site.weight}",
        shape,
        storage.label(layer, site.weight),
        lambda: matrix(storage.read(layer, site.weight)),
    )


def _weights(adapter: Adapter, stored: Callable[[str], Tensor] | None = None) -> Iterator[Weight]:
    """Every adapted weight as (out, in), or every replaced tensor where there is none."""
    plain, found = plain_names(adapter.model), False
    for path, site, _ in adapter.deltas():
        found = True
        layer = adapter.layers[path]
        storage = storage_of(layer.base, site.weight, path)

        def read(layer: Any = layer, site: Any = site, path: str = path) -> Tensor:
            weight = layer.stored(site) if stored is None else stored(f"{path}.{site.weight}")
            return cast(Tensor, site.layout.matrix(weight))

        shape = (site.layout.shape.out, site.layout.shape.in_)
        yield Weight(f"{plain[path]}.{site.weight}", shape, storage.label(layer.base, site.weight), read)
    if adapter.edits:  # they stand around calls, and are about all of the model
        found, modules = True, dict(walk(adapter.model))
        for path in select(adapter.model, Targets()):
            yield _plain_weight(modules[path], path, plain[path])
    for path, replacement in adapter.replacements() if not found else ():
        state = adapter.layers[path].base.state_dict()
        kept = adapter.layers[path].unmerged
        for name in replacement.names:
            tensor = kept[name].read() if name in kept else state[name]
            yield Weight(f"{plain[path]}.{name}", tuple(tensor.shape), "float", tensor.detach)


def fingerprint(adapter: Adapter, stored: Callable[[str], Tensor] | None = None) -> dict[str, Any]:
    """The fingerprint of the base under an adapter, as plain data.

    `stored` gives a base tensor by its name, for a model on the meta device, which holds none.
    """
    weights = list(_weights(adapter, stored))
    shapes = hashlib.sha256("\n".join(f"{one.name} {one.shape}" for one in weights).encode())
    chosen = weights[:: max(1, len(weights) // 64)]
    each = max(4, SAMPLES // max(1, len(chosen)))
    values = torch.cat([_sample(gathered(one.read()), each) for one in chosen]) if chosen else torch.zeros(0)
    return {
        "architecture": type(unwrapped(adapter.model)).__name__,
        "layers": len(weights),
        "shapes": shapes.hexdigest(),
        "sample": [round(value, 8) for value in values.to(torch.bfloat16).tolist()],
        "storage": sorted({one.storage for one in weights}),
        "rewritten": bool(adapter.originals),
        "settings": settings_of(unwrapped(adapter.model)),
    }


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The settings of a model's configuration that change what its weights compute; parts joined by dots."""
    config: Any = getattr(model, "config", None)
    found: dict[str, Any] = {}

    def gather(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            place = f"{prefix}{name}"
            if isinstance(value, Mapping):
                gather(value, f"{place}.")
            elif (
                isinstance(value, list | tuple | str | int | float)
                and _ACTS.search(place)
                and not _ACTS_NOT.search(place)
            ):
                found[place] = list(value) if isinstance(value, tuple) else value

    gather(config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {}, "")
    return dict(sorted(found.items()))


def _other_settings(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What two models that name the same settings have set otherwise, in words."""

    def same(one: Any, other: Any) -> bool:
        numbers = all(isinstance(value, int | float) for value in (one, other))
        return math.isclose(one, other, rel_tol=1e-5) if numbers else bool(one == other)

    return [
        f"{name} {value!r} (here {found[name]!r})"
        for name, value in expected.items()
        if name in found and not same(value, found[name])
    ]


def check(adapter: Adapter, expected: Mapping[str, Any] | None, path: Path, complain: Callable[[str], None]) -> None:
    """Compare the base under an adapter with the one its file names; complain where they differ."""
    if not expected:
        return
    found = fingerprint(adapter)
    if expected["shapes"] != found["shapes"]:
        complain(
            f"load: {path} was made for a {expected['architecture']} with {expected['layers']} adapted matrices of other "
            f"names or shapes than the {found['layers']} of this {found['architecture']}."
        )
        return
    wrong = disagreement(expected, found)
    if wrong:
        reason = (
            " Its start replaced the base's weights (LoftQ), so that it needs the base as it was then: quantised in the same "
            "way, or saved with the adapter."
        )
        told = reason if expected.get("rewritten") else ""
        complain(f"load: {path} was made for another base model: {wrong} (here is a {found['architecture']}).{told}")
        return
    if others := _other_settings(expected.get("settings", {}), found["settings"]):
        log.warning(
            "load: %s was trained on a base with %s. The weights are the same, but the model computes something else. Set it "
            "in the base's configuration (from_pretrained takes it by name), unless the difference is meant.",
            path,
            ", ".join(others),
        )
    if _differing(expected, found) > DIFFERING:
        trained, held = _storage(expected), _storage(found)
        log.warning(
            "load: %s was trained on a base held as %s, and this one is held as %s: the same model with weights rounded "
            "otherwise, so that its answers differ a little from those it was trained to give.%s",
            path,
            ", ".join(trained),
            ", ".join(held),
            " For the very same, quantise this base in that way." if trained != ["float"] else "",
        )


def disagreement(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str | None:
    """How two fingerprints differ, in words; empty where they are of one base (perhaps quantised in one of the two), None
    where they cannot be compared."""
    if not one or not other or one["shapes"] != other["shapes"]:
        return None
    differing = _differing(one, other)
    if differing <= DIFFERING:
        return ""
    if one.get("rewritten") or _storage(one) == _storage(other) == ["float"]:
        return f"{differing:.0%} of {len(one['sample'])} sampled weights differ"
    likeness = torch.nn.functional.cosine_similarity(torch.tensor(one["sample"]), torch.tensor(other["sample"]), dim=0)
    if likeness < LIKENESS:
        return (
            f"the sampled weights agree to {likeness:.2f} only, where a quantised copy of the same model has {LIKENESS}"
        )
    return ""


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The share of sampled weights that differ: two roundings to bfloat16 are at most 2^-7 of the value apart, and tiny
    numbers are compared absolutely."""
    first, second = torch.tensor(one["sample"]), torch.tensor(other["sample"])
    return ((first - second).abs() > 2**-7 * first.abs() + 1e-6).float().mean().item()


def _storage(fingerprint: Mapping[str, Any]) -> list[str]:
    return list(fingerprint.get("storage", ["float"]))
