"""Adapters as sources of changes: on a model, or in a folder without its base where the file alone says what ΔW is.

A place is the name of one matrix: its layer's, and within a layer of several matrices the matrix's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.algebra.changes import Change
from lorakit.core.delta import Delta, LowRank
from lorakit.core.layout import Rows, Site
from lorakit.core.storage import value_of
from lorakit.core.walking import has_suffix, value_for
from lorakit.errors import LorakitError
from lorakit.files.bundle import TENSORS, read_bundle
from lorakit.files.fingerprint import disagreement
from lorakit.files.interchange import PAIRS, PREFIX, scale_in

WHOLE = ".full_P"


class Source(ABC):
    """Something that changes matrices.

    Attributes:
        label: what to call it in messages.
    """

    label: str

    @abstractmethod
    def places(self) -> list[str]:
        """The matrices it changes, in the model's or the file's order."""

    @abstractmethod
    def change(self, place: str) -> Change:
        """What it adds to one matrix; made when asked for."""


def sources(given: Sequence[Adapter | str | Path], verb: str) -> list[Source]:
    """Adapters, all on one model, or folders, all for one base; anything else is refused."""
    if isinstance(given, str | Path | Adapter) or not given:
        raise LorakitError(f"{verb}: a list of adapters, or of adapter folders, is wanted; {given!r} was given.")
    live = [one for one in given if isinstance(one, Adapter)]
    folders = [one for one in given if isinstance(one, str | Path)]
    if len(live) == len(given):
        for adapter in live:
            if adapter.model is not live[0].model:
                raise LorakitError(
                    f"{verb}: {adapter.name!r} is on another model than {live[0].name!r}; load both onto one model."
                )
        return [Live(adapter, verb) for adapter in live]
    if len(folders) == len(given):
        return [Stored(folder, verb) for folder in folders]
    kinds = ", ".join(sorted({type(one).__name__ for one in given}))
    raise LorakitError(
        f"{verb}: adapters on a model and folders do not mix, and {kinds} were given; lk.load(model, folder) makes an adapter "
        "of a folder."
    )


# -- on a model ------------------------------------------------------------------------------------------------------------


class Live(Source):
    """An adapter on its model, of any method."""

    def __init__(self, adapter: Adapter, verb: str) -> None:
        if adapters(adapter.model).get(adapter.name) is not adapter:
            raise LorakitError(f"{verb}: adapter {adapter.name!r} has been taken off its model.")
        for what, held in (
            ("edits", adapter.edits),
            ("a router, whose change differs from token to token", adapter.router),
        ):
            if held:
                raise LorakitError(
                    f"{verb}: adapter {adapter.name!r} is {what} ({adapter.method.name}), and no change of a matrix. Adapters "
                    "of weights work: lora and the others of `lorakit methods`."
                )
        for key, tensor in adapter.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise LorakitError(f"{verb}: {key} of adapter {adapter.name!r} holds a NaN or an infinity.")
        self.adapter, self.label = adapter, adapter.name
        self.at = {site.place(path): (path, site, delta) for path, site, delta in adapter.deltas()}

    def places(self) -> list[str]:
        return list(self.at)

    def change(self, place: str) -> Change:
        path, site, delta = self.at[place]
        return change_of(self.adapter, path, site, delta)

    def shift(self, place: str) -> Tensor | None:
        """What it adds to the bias of a matrix, in the place that the layer's bias has for it; None: nothing."""
        path, site, delta = self.at[place]
        layer = self.adapter.layers[path]
        bias = None
        if site.bias is not None:
            bias = frozen(layer, site.bias)
            bias = site.layout.part(bias) if isinstance(site.layout, Rows) else bias
        with torch.no_grad():
            shift = delta.shift(bias)
            return shift if shift is None or not isinstance(site.layout, Rows) else site.layout.features(shift, shift)


def change_of(adapter: Adapter, path: str, site: Site, delta: Delta) -> Change:
    """What one delta adds to its matrix."""
    with torch.no_grad():
        if isinstance(delta, LowRank):
            B, A = delta.gated()
            return Change.of(B.double() * delta.scale, A)
        return Change.of(delta.dense(matrix_of(adapter, path, site)))


def matrix_of(adapter: Adapter, path: str, site: Site) -> Tensor:
    """The frozen weight (out, in) under a site, whatever is merged into it just now."""
    layer = adapter.layers[path]
    return site.layout.matrix(layer.stored(site))


def frozen(layer: Any, name: str) -> Tensor:
    """One of the base's own tensors in an adapted layer, whatever is merged into it just now."""
    if name in layer.kept:
        return cast(Tensor, layer.kept[name].read())
    found = value_of(layer.base, name)
    return cast(Tensor, found.detach() if isinstance(found, Tensor) else found)


# -- in a folder -----------------------------------------------------------------------------------------------------------


def needs_base(config: Mapping[str, Any]) -> str:
    """Why a folder's file does not say what ΔW is without the base model; empty where it does."""
    kind = config.get("peft_type")
    if kind == "LORA":
        return "DoRA" if config.get("use_dora") else ""
    return "" if kind == "FULL" else str(kind)


class Stored(Source):
    """A folder of a LoRA or of whole matrices. All of it is read and checked at once; nothing in it is unknown.

    Attributes:
        bundle: what the folder holds.
        others: tensors that are no change of a matrix: trained biases and modules_to_save.
    """

    def __init__(self, folder: str | Path, verb: str) -> None:
        self.bundle = read_bundle(folder)
        self.label = str(folder)
        self.where = self.bundle.folder / TENSORS
        if self.bundle.stale:
            raise LorakitError(self.bundle.stale)
        config = self.bundle.config
        kind = needs_base(config)
        if kind:
            raise LorakitError(
                f"{verb}: {folder} holds {kind}, whose ΔW is not in the file but depends on the base model's layers. With its "
                f"base: lk.load it and give the adapter; on the command line give --base."
            )
        self.pairs: dict[str, tuple[str, str]] = {}
        self.wholes: dict[str, str] = {}
        self.others: dict[str, Tensor] = {}
        for key, tensor in self.bundle.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise LorakitError(f"{verb}: {key} in {self.where} holds a NaN or an infinity.")
            self._sort(key, verb)
        self._check_pairs(verb)
        if not self.places():
            raise LorakitError(f"{verb}: {self.where} changes no matrix.")

    def _sort(self, key: str, verb: str) -> None:
        tensors = self.bundle.tensors
        for ending_A, ending_B in PAIRS.items():
            for ending, other in ((ending_A, ending_B), (ending_B, ending_A)):
                if key.endswith(ending):
                    stem = key.removesuffix(ending)
                    if stem + other not in tensors:
                        raise LorakitError(
                            f"{verb}: {self.where} holds {key!r} and lacks its other half {stem + other!r}."
                        )
                    self.pairs[stem.removeprefix(PREFIX)] = (stem + ending_A, stem + ending_B)
                    return
        if key.endswith(WHOLE):
            self.wholes[key.removesuffix(WHOLE).removeprefix(PREFIX)] = key
        elif self._is_known(key):
            self.others[key] = tensors[key]
        elif not self._is_copy(key):
            raise LorakitError(
                f"{verb}: {self.where} holds {key!r}, which is no factor, no trained bias and in none of modules_to_save "
                f"{self.bundle.config.get('modules_to_save') or []}."
            )

    def _is_known(self, key: str) -> bool:
        config = self.bundle.config
        path = key.removeprefix(PREFIX).rpartition(".")[0]
        saved = config.get("modules_to_save") or ()
        inside = [path] + [path[:index] for index, letter in enumerate(path) if letter == "."]
        return (str(config.get("bias", "none")) != "none" and "bias" in key.rpartition(".")[2]) or any(
            has_suffix(one, name) for one in inside for name in saved
        )

    def _is_copy(self, key: str) -> bool:
        """Whether a tensor is PEFT's copy of an adapted embedding's own weight."""
        stem = key.removesuffix(".weight").removesuffix(".base_layer")
        return key.endswith(".weight") and f"{stem}.lora_embedding_A" in self.bundle.tensors

    def _check_pairs(self, verb: str) -> None:
        config, tensors = self.bundle.config, self.bundle.tensors
        for path, (key_A, key_B) in self.pairs.items():
            rank, columns = tensors[key_A].shape[0], tensors[key_B].shape[1]
            if rank != columns:
                raise LorakitError(
                    f"{verb}: the ranks of a pair do not match in {self.where}: {key_A} has {rank} rows, and {key_B} has "
                    f"{columns} columns."
                )
            said = value_for(config.get("rank_pattern") or {}, path)
            said = config.get("r", rank) if said is None else said
            if said != rank:
                raise LorakitError(
                    f"{verb}: the configuration of {self.label} says rank {said} for {path}, and {key_A} has {rank} rows, so "
                    "that its scale is not known."
                )

    def scale(self, path: str) -> float:
        """The s of `ΔW = s B A` of a layer."""
        return scale_in(self.bundle.config, path, self.bundle.tensors[self.pairs[path][0]].shape[0])

    def places(self) -> list[str]:
        return [*self.pairs, *self.wholes]

    def change(self, place: str) -> Change:
        tensors = self.bundle.tensors
        if place in self.wholes:
            return Change.of(tensors[self.wholes[place]])
        key_A, key_B = self.pairs[place]
        return Change.of(tensors[key_B].flatten(1).double() * self.scale(place), tensors[key_A].flatten(1))

    def base(self) -> Mapping[str, Any]:
        """What the folder says of its base: {"name": …, "fingerprint": …}, either may be None."""
        name = self.bundle.config.get("base_model_name_or_path")
        return {"name": name, "fingerprint": self.bundle.own.get("base", {}).get("fingerprint")}


def check_bases(stored: Sequence[Stored], verb: str) -> None:
    """Refuse folders for different bases: by their fingerprints where these can be compared, else by name."""
    first = stored[0]
    for other in stored[1:]:
        ours, theirs = first.base(), other.base()
        found = disagreement(ours["fingerprint"], theirs["fingerprint"])
        if found is None:  # no fingerprint, or one of other layers
            names = [str(base["name"]) for base in (ours, theirs)]
            found = "" if Path(names[0]).name == Path(names[1]).name else f"their names are {names[0]} and {names[1]}"
        if found:
            raise LorakitError(
                f"{verb}: {first.label} and {other.label} were made for different base models: {found}. Load both onto the "
                "one that you mean, if they fit it."
            )
