"""Another adapter's numbers in the place of a live one's: no layer is touched, no shape changes, nothing is compiled again.

A slot is a plain LoRA of the largest rank that will ever be wanted; it is made once, before torch.compile. What is put into
it brings its scale within its factors and is padded with zeros to the slot's rank, so that all a compiled model sees is the
same tensors with other contents.

    slot = lk.attach(model, lk.LoRA(rank=64, alpha=64), name="slot")
    compiled = torch.compile(model)
    lk.swap(slot, "adapters/sql")       # a LoRA of rank 8
    lk.swap(slot, "adapters/law")       # of rank 32; nothing is compiled again

Where several adapters stay on the model, choosing among them needs none of this: `activate` sets one attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.algebra.changes import Change
from lorakit.algebra.sources import Live, Stored, frozen, sources
from lorakit.errors import LorakitError
from lorakit.files.fingerprint import disagreement, fingerprint
from lorakit.files.interchange import PREFIX, plain_names, replacement_key
from lorakit.methods import LoRA
from lorakit.methods.lora import LoRADelta


def swap(slot: Adapter, other: Adapter | str | Path) -> None:
    """Put what another adapter adds into a live LoRA, in place. Layers that the other leaves alone add nothing then.

    Args:
        slot: a plain LoRA on its model, of at least the other's rank in every layer.
        other: an adapter with factors on the same model, or the folder of a LoRA.

    Raises:
        LorakitError: the slot is no plain LoRA; the other has no factors, a larger rank, layers or whole tensors that the slot
            lacks, or another base. The slot is as it was then.
    """
    live = Live(slot, "swap")
    if type(slot.method) is not LoRA or not all(type(delta) is LoRADelta for _, _, delta in live.at.values()):
        raise LorakitError(
            f"swap: the slot {slot.name!r} is {slot.method.name}; a plain LoRA whose rank is the largest wanted takes others "
            "in, such as lk.attach(model, lk.LoRA(rank=64, alpha=64))."
        )
    given = sources([other], "swap")[0]
    if isinstance(given, Live):
        if given.adapter.model is not slot.model:
            raise LorakitError(f"swap: {given.label!r} is on another model than the slot {slot.name!r}.")
        names = {place: place for place in live.places()}
        whole = {
            (path, key): tensor.detach()
            for path, replacement in given.adapter.replacements()
            for key, tensor in replacement.tensors().items()
        }
    else:
        stored = cast(Stored, given)
        wrong = disagreement(fingerprint(slot), stored.base()["fingerprint"])
        if wrong:
            raise LorakitError(f"swap: {stored.label} was made for another base model: {wrong}.")
        plain = plain_names(slot.model)
        names = {place: _plain(place, live.at[place][0], plain) for place in live.places()}
        whole = _whole(slot, stored, plain)
    values = _values(live, given, names)
    held = {
        (path, key): tensor
        for path, replacement in slot.replacements()
        for key, tensor in replacement.tensors().items()
    }
    for path, key in whole:
        if (path, key) not in held:
            raise LorakitError(
                f"swap: {given.label} holds its own {path}.{key}, for which the slot {slot.name!r} has no place; give the "
                "slot the same modules_to_save and bias."
            )
    with torch.no_grad():
        for place, (B, A) in values.items():
            delta = cast(LoRADelta, live.at[place][2])
            delta.B.zero_()
            delta.A.zero_()
            if A.shape[0]:
                delta.B[:, : A.shape[0]].copy_(B / delta.scale)
                delta.A[: A.shape[0]].copy_(A)
        for (path, key), tensor in held.items():
            layer = slot.layers[path]
            tensor.copy_(whole[path, key] if (path, key) in whole else frozen(layer, key))


def _plain(place: str, path: str, plain: Mapping[str, str]) -> str:
    return plain[path] + place.removeprefix(path)


def _whole(slot: Adapter, stored: Stored, plain: Mapping[str, str]) -> dict[tuple[str, str], Tensor]:
    """The folder's trained biases and saved modules by the slot's own names; what has no place in the slot is refused."""
    result: dict[tuple[str, str], Tensor] = {}
    left = dict(stored.others)
    for path, replacement in slot.replacements():
        for name in replacement.names:
            key = PREFIX + replacement_key(slot, path, plain[path], name)
            if key in left:
                result[path, name] = left.pop(key)
    if left:
        raise LorakitError(
            f"swap: {stored.label} holds {next(iter(left))}, for which the slot {slot.name!r} has no place; give the slot "
            "the same modules_to_save and bias."
        )
    return result


def _values(live: Live, given: Live | Stored | object, names: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Place of the slot -> the other's factors there, none where it has none."""
    source = cast(Stored, given)
    changed = dict.fromkeys(source.places())
    unknown = [place for place in changed if place not in set(names.values())]
    if unknown:
        raise LorakitError(
            f"swap: {source.label} changes {unknown[0]} ({len(unknown)} such), for which the slot {live.label!r} has no "
            "place; the slot must cover every layer that any adapter changes."
        )
    if isinstance(given, Live):
        for place in changed:
            if given.shift(place) is not None:
                raise LorakitError(
                    f"swap: {given.at[place][2].spec.name} changes the bias of {place}, which no LoRA has."
                )
    result = {}
    for place, name in names.items():
        delta = cast(LoRADelta, live.at[place][2])
        if name not in changed:
            result[place] = delta.B.new_zeros(delta.B.shape[0], 0), delta.A.new_zeros(0, delta.A.shape[1])
            continue
        change: Change = source.change(name)
        if change.A is None:
            raise LorakitError(
                f"swap: {source.label} has no factors for {name}; lk.resize(adapter, rank={delta.A.shape[0]}) makes a LoRA of "
                "it, with its error told."
            )
        if change.shape != (delta.B.shape[0], delta.A.shape[1]):
            raise LorakitError(
                f"swap: {name} is {change.shape[0]} × {change.shape[1]} in {source.label} and {delta.B.shape[0]} × "
                f"{delta.A.shape[1]} here, so it is for another base model."
            )
        if change.A.shape[0] > delta.A.shape[0]:
            raise LorakitError(
                f"swap: {source.label} has rank {change.A.shape[0]} at {name}, and the slot {live.label!r} holds at most "
                f"{delta.A.shape[0]}; make the slot larger, or cut the adapter with lk.resize."
            )
        result[place] = change.B, change.A
    return result
