"""Writing `W + ΔW` into the base, and taking it out again.

Merging is an explicit act and leaves no flag behind. `merge` is for good: the weights change and the adapter comes off.
`merged` is for a while: it keeps the original tensors and puts their very bits back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import adapters, adapters_of
from lorakit.adapter.attachment import detach
from lorakit.core.injection import ties
from lorakit.core.layer import Adapted
from lorakit.core.routing import Blend, Routing, parse
from lorakit.core.state import ModelState, state_of
from lorakit.core.storage import FLOAT, Snapshot, Storage, owner, storage_of, value_of
from lorakit.core.walking import walk
from lorakit.errors import LorakitError
from lorakit.models.evaluating import evaluating
from lorakit.models.floats import cast_parameters, float_layer, is_packed, unpack


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layers: paths of the layers whose tensors changed.
        error: path -> relative error that storing made beyond the float dtype's rounding; 0 for float weights.
    """

    layers: tuple[str, ...]
    error: dict[str, float] = field(default_factory=dict)


Weighted = list[tuple[str, float]]


def _uniform(state: ModelState, route: str | Blend, verb: str) -> Weighted:
    here = adapters_of(state)
    routing = parse(route, here)
    if routing.weights is None:
        raise LorakitError(f"{verb}: a route with one adapter per row cannot be one weight; give a name or a blend.")
    if not routing.names:
        raise LorakitError(f"{verb}: no adapter was named; on this model are: {', '.join(here)}.")
    for name in routing.names:
        if getattr(here[name].router, "members", ()) == (name,):
            raise LorakitError(
                f"{verb}: {name!r} ({here[name].method.name}) acts from its invocation tokens on and not before, "
                "so there is no one change to write into the weights; use it unmerged."
            )
        if here[name].router is not None:
            raise LorakitError(
                f"{verb}: {name!r} ({here[name].method.name}) weighs its experts for each token, so there is "
                "no one change to write into the weights. Its experts can be merged or combined by fixed weights (those that "
                "lorahub found are adapter.router.blend())."
            )
    return list(zip(routing.names, routing.weights, strict=True))


def _layers(state: ModelState, blend: Weighted) -> dict[str, Adapted]:
    layers: dict[str, Adapted] = {}
    for name, _ in blend:
        layers.update(adapters_of(state)[name].layers)
    return layers


def _check(
    model: nn.Module,
    state: ModelState,
    blend: Weighted,
    layers: dict[str, Adapted],
    untie: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Everything that can be refused, before the first weight changes."""
    for name, _ in blend:
        adapter = adapters_of(state)[name]
        if adapter.edits:
            raise LorakitError(
                f"merge: {name!r} cannot be merged: it is {adapter.method.name}, and {adapter.method.reason}. Keep it beside "
                "its model (lk.use, or lorakit generate --adapter)."
            )
        for key, parameter in adapter.named_parameters():
            if not torch.isfinite(parameter).all():
                raise LorakitError(f"merge: {key} of adapter {name!r} holds a NaN or an infinity; nothing was merged.")
    tied = ties(dict(walk(model)))
    agreed = {} if untie else _agreed(layers, tied, blend)
    for path, layer in layers.items():
        for site in layer.sites.values():
            reason = storage_of(layer.base, site.weight, path).refusal(layer.base, site.weight)
            if reason and dtype is None:
                raise LorakitError(
                    f"merge: nothing can be written into {path}: {reason}. Merge into a float copy: "
                    "lk.merge(model, name, dtype=torch.bfloat16), or lorakit merge BASE ADAPTER --dtype bf16."
                )
        if path in tied and not untie and path not in agreed:
            raise LorakitError(
                f"merge: {path} shares its weight with {', '.join(tied[path])}, which would change too. untie=True (--untie) "
                f"gives {path} a weight of its own (and the model's files will hold both)."
            )
    for layer in layers.values():
        _check_values(layer, blend, dtype)


def _agreed(layers: dict[str, Adapted], tied: Mapping[str, list[str]], blend: Weighted) -> dict[str, dict[str, Tensor]]:
    """The values of layers that share a weight and would all hold the same one, as a vocabulary that is saved whole under each
    of its names: it stays shared."""
    with torch.no_grad():
        values = {path: _values(layer, blend) for path, layer in layers.items() if path in tied}

    def agrees(path: str, other: str) -> bool:
        if other not in values:
            return False
        here, there = layers[path].base._parameters, layers[other].base._parameters
        names = [(one, two) for one in here for two in there if here[one] is not None and here[one] is there[two]]
        held, theirs = values[path], values[other]
        return all(one in held and two in theirs and torch.equal(held[one], theirs[two]) for one, two in names)

    return {path: own for path, own in values.items() if all(agrees(path, other) for other in tied[path])}


def _check_values(layer: Adapted, blend: Weighted, dtype: torch.dtype | None) -> None:
    """What one layer would hold, in the format that it would be written in; only then is anything written."""
    with torch.no_grad():
        values = _values(layer, blend)
    for name, value in values.items():
        storage = _storage(layer, name)
        if value.is_floating_point():
            # a quantised storage has the range of the floats that it was made from
            value = value.to(dtype or storage.read(layer.base, name).dtype)
        if not torch.isfinite(value).all():
            raise LorakitError(
                f"merge: {layer.path}.{name} would hold a NaN or an infinity in {value.dtype}; nothing was merged."
            )


def _storage(layer: Adapted, name: str) -> Storage:
    """What writes one of a layer's tensors: the weight's own storage; biases and replaced tensors are plain."""
    weights = {site.weight for site in layer.sites.values()}
    return storage_of(layer.base, name, layer.path) if name in weights else FLOAT


def _values(layer: Adapted, blend: Weighted) -> dict[str, Tensor]:
    """The layer's tensors under a blend; what training drops of an adapter is not dropped here."""
    with evaluating(layer.deltas):
        return layer.substitutes(blend)


def _write(
    layer: Adapted,
    blend: Weighted,
    kept: dict[str, Snapshot] | None,
    shared: bool = False,
    values: Mapping[str, Tensor] | None = None,
) -> float:
    """Write one layer's blend (`values`, if they are there already) into its base; with `kept`, remember the tensor objects
    that were there; where they are `shared` with another layer, this one gets its own."""
    error = 0.0
    with torch.no_grad():
        values = _values(layer, blend) if values is None else values
    for name, value in values.items():
        storage = _storage(layer, name)
        if kept is not None:
            kept[name] = storage.snapshot(layer.base, name)
        error = max(error, storage.write(layer.base, name, value, fresh=kept is not None or shared))
    return error


def _into_floats(layer: Adapted, blend: Weighted, dtype: torch.dtype) -> None:
    """One layer's blend in floats of this dtype, rounded once; a packed layer becomes a float one."""
    with torch.no_grad():
        values = _values(layer, blend)
    if is_packed(layer.base):
        layer.base = float_layer(layer.base, dtype, values)
        return
    for name, value in values.items():
        module, attribute = owner(layer.base, name)
        before = value_of(layer.base, name)
        value = value.to(dtype) if before.is_floating_point() else value
        fresh = nn.Parameter(value, requires_grad=before.requires_grad) if isinstance(before, nn.Parameter) else value
        setattr(module, attribute, fresh)


def merge(model: nn.Module, route: str | Blend, untie: bool = False, dtype: torch.dtype | None = None) -> MergeReport:
    """Write adapters into the base weights for good and take them off: no adapter, no latency.

    A quantised base is quantised again, and the report says what error that makes. With `dtype` it becomes a float model
    instead, merged against the floats that its codes stand for, which are what the adapter was trained on.

    Args:
        model: a model with the adapters.
        route: a name or a blend {name: weight}.
        untie: give a layer that shares its weight with another (tied embeddings) a weight of its own first. Not needed where
            all that share it get the same.
        dtype: make the whole base a float model of this dtype.

    Raises:
        LorakitError: something cannot be merged; no weight has changed then.
    """
    state = state_of(model)
    blend = _uniform(state, route, "merge")
    if state.merged:
        raise LorakitError(
            f"merge: adapter {min(state.merged)!r} is merged temporarily, and the weights will be put back; leave "
            "`merged` first."
        )
    layers = _layers(state, blend)
    _check(model, state, blend, layers, untie, dtype)
    report = MergeReport(tuple(layers))
    tied = ties(dict(walk(model)))
    agreed = {} if untie else _agreed(layers, tied, blend)
    for path, layer in layers.items():
        if dtype is None:
            own = agreed.get(path)
            report.error[path] = _write(layer, blend, None, shared=path in tied and own is None, values=own)
        else:
            _into_floats(layer, blend, dtype)
            report.error[path] = 0.0
    for name, _ in blend:
        adapters_of(state)[name].originals.clear()  # what was merged stays, though a start replaced weights before
        detach(model, name)
    if dtype is not None:
        others = [tensor for adapter in adapters(model).values() for tensor in adapter.parameters()]
        unpack(model, dtype)
        cast_parameters(model, dtype, others)
    if untie and any(path in tied for path in layers):
        _untie_config(model)
    return report


def _untie_config(model: nn.Module) -> None:
    """Tell a transformers model that its embeddings are no longer tied, so that both are saved and loaded."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "get_text_config", lambda: None)()):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


@contextmanager
def merged(model: nn.Module, route: str | Blend) -> Iterator[None]:
    """Within the block the adapters are written into the weights and do not run; afterwards the very bits are back.

    Tensors of merged layers are fresh objects within the block, so a tied weight stays as it is in the other place. Other
    adapters, active or merged inside, add what they would add beside it: `{merged: 1, other: 1}`.

    Args:
        model: a model with the adapters.
        route: a name or a blend {name: weight}.

    Raises:
        LorakitError: something cannot be merged, or is merged already; no weight has changed then.
    """
    state = state_of(model)
    blend = _uniform(state, route, "merged")
    layers = _layers(state, blend)
    _check(model, state, blend, layers, untie=True)
    kept: dict[str, dict[str, Snapshot]] = {}
    firsts: list[tuple[Adapted, list[str]]] = []
    routing, names = state.routing, {name for name, _ in blend}
    already = sorted(names & state.merged)
    if already:
        raise LorakitError(f"merged: adapter {already[0]!r} is merged already.")
    try:
        for path, layer in layers.items():
            kept[path] = {}
            _write(layer, blend, kept[path])
            first = {name: held for name, held in kept[path].items() if name not in layer.unmerged}
            firsts.append((layer, list(first)))
            layer.unmerged.update(first)
        state.merged |= names
        state.routing = _without(routing, names)
        yield
    finally:
        for tensors in kept.values():
            for held in tensors.values():
                held.restore()
        for layer, written in firsts:
            for name in written:
                layer.unmerged.pop(name, None)
        state.merged -= names
        state.routing = routing


def _without(routing: Routing, names: set[str]) -> Routing:
    left = [index for index, name in enumerate(routing.names) if name not in names]
    table = routing.table[:, left] if routing.table is not None else None
    weights = None if routing.weights is None else tuple(routing.weights[index] for index in left)
    return Routing(tuple(routing.names[index] for index in left), weights, table, routing.axis)
