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
from lorakit.algebra.sources import Live, Source, Stored, check_shapes, refuse_biases, sources
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
    (given,) = sources([other], "swap")
    held = _by_name(live)
    if isinstance(given, Live):
        if given.adapter.model is not slot.model:
            raise LorakitError(f"swap: {given.label!r} is on another model than the slot {slot.name!r}.")
        names, replaced = {place: place for place in live.places()}, _by_name(given)
    else:
        wrong = disagreement(fingerprint(slot), cast(Stored, given).base()["fingerprint"])
        if wrong:
            raise LorakitError(f"swap: {given.label} was made for another base model: {wrong}.")
        plain = plain_names(slot.model)
        names = {place: plain[path] + place.removeprefix(path) for place, (path, _, _) in live.at.items()}
        keys = {PREFIX + replacement_key(slot, path, plain[path], name): (path, name) for path, name in held}
        replaced = {keys.get(key, ("", key)): tensor for key, tensor in given.replaced().items()}
    values = _values(live, given, names)
    for path, key in replaced:
        if (path, key) not in held:
            raise LorakitError(
                f"swap: {given.label} holds its own {path}{path and '.'}{key}, for which the slot {slot.name!r} has no place; "
                "give the slot the same modules_to_save and bias."
            )
    with torch.no_grad():
        for place, (_, _, delta) in live.at.items():
            lora = cast(LoRADelta, delta)
            B, A = lora.B, lora.A
            B.zero_()
            A.zero_()
            if place in values:
                new_B, new_A = values[place]
                B[:, : len(new_A)].copy_(new_B / lora.scale)
                A[: len(new_A)].copy_(new_A)
        for (path, key), tensor in held.items():
            tensor.copy_(replaced[path, key] if (path, key) in replaced else slot.layers[path].frozen(key))


def _by_name(live: Live) -> dict[tuple[str, str], Tensor]:
    """Trained biases and saved modules by path and name."""
    return {
        (path, key): tensor.detach() for path, tensors in live.replaced().items() for key, tensor in tensors.items()
    }


def _values(live: Live, given: Source, names: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Place of the slot -> the other's factors there, for those that the other changes."""
    places = {name: place for place, name in names.items()}
    unknown = [name for name in given.places() if name not in places]
    if unknown:
        raise LorakitError(
            f"swap: {given.label} changes {unknown[0]} ({len(unknown)} such), for which the slot {live.label!r} has no "
            "place; the slot must cover every layer that any adapter changes."
        )
    refuse_biases(given, "swap")
    result = {}
    for name in given.places():
        change, slot = given.change(name), cast(LoRADelta, live.at[places[name]][2])
        shape, rank = (slot.B.shape[0], slot.A.shape[1]), len(slot.A)
        if change.A is None:
            raise LorakitError(
                f"swap: {given.label} has no factors for {name}; lk.resize(adapter, rank={rank}) makes a LoRA "
                "of it, and reports its error."
            )
        check_shapes("swap", name, [(given.label, change.shape), (live.label, shape)])
        if len(change.A) > rank:
            raise LorakitError(
                f"swap: {given.label} has rank {len(change.A)} at {name}, and the slot {live.label!r} holds at most {rank}; "
                "make the slot larger, or cut the adapter with lk.resize."
            )
        result[places[name]] = change.B, change.A
    return result
