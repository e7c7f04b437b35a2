"""Adapters as sources of changes: on a model, or in a folder without its base where the file alone says what ΔW is.

A place is the name of one matrix: its layer's, and within a layer of several matrices the matrix's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.algebra.changes import Change
from lorakit.core.delta import LowRank
from lorakit.core.layout import Rows
from lorakit.core.walking import has_suffix, value_for
from lorakit.errors import LorakitError
from lorakit.files.bundle import TENSORS, read_bundle
from lorakit.files.fingerprint import disagreement
from lorakit.files.interchange import PREFIX, scale_in
from lorakit.files.pairs import WHOLE, pair_of
from lorakit.files.stacked import unstack
from lorakit.init.calibration import Batch


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

    def found(self, place: str) -> Change | None:
        """The same, None where it does not change the matrix."""
        return self.change(place) if place in self.places() else None

    @abstractmethod
    def leading(self, place: str, rank: int) -> Change:
        """What the method itself puts first, at this rank."""

    @abstractmethod
    def replaced(self) -> dict[str, Any]:
        """Trained biases and modules_to_save: on a model path -> name -> tensor, in a folder name -> tensor."""

    def shift(self, place: str) -> Tensor | None:
        """What it adds to the bias beside one matrix, if its method does that (biases trained as such are `replaced`)."""
        return None


def source(given: Adapter | str | Path, verb: str, output: str | Path | None) -> Source:
    """One adapter or folder, of which another adapter or `output` is made."""
    (found,) = sources([given], verb)
    check_output([found], verb, output)
    return found


def check_output(given: Sequence[Source], verb: str, output: str | Path | None) -> None:
    """Refuse folders without a folder to write, or over one of them; and adapters on a model with one."""
    if isinstance(given[0], Live):
        if output is not None:
            raise LorakitError(
                f"{verb}: adapters on a model give an adapter on the model; save that, and leave output out."
            )
    elif output is None:
        raise LorakitError(f"{verb}: folders were given, so output= names the folder to write.")
    for one in given:
        if isinstance(one, Stored) and one.bundle.folder.resolve() == Path(str(output)).expanduser().resolve():
            raise LorakitError(f"{verb}: {output} is one of the adapters itself; choose another folder to write.")


def refuse_biases(given: Source, verb: str) -> None:
    """Refuse a method that changes biases by itself, which a LoRA cannot."""
    for place in given.places():
        if given.shift(place) is not None:
            name = cast(Live, given).at[place][2].spec.name
            raise LorakitError(f"{verb}: {name} changes the bias of {place}, which a LoRA cannot.")


def check_shapes(verb: str, place: str, shapes: Sequence[tuple[str, tuple[int, int]]]) -> None:
    """Refuse changes of one matrix, each with whose it is, that have different shapes."""
    if len({shape for _, shape in shapes}) > 1:
        sizes = " and ".join(f"{out} × {in_} in {label}" for label, (out, in_) in shapes)
        raise LorakitError(f"{verb}: {place} is {sizes}, so they are for different base models.")


def checked_batches(what: str, batches: Iterable[Batch]) -> list[Batch]:
    """Batches to run a model on, as a list."""
    given = list(batches)
    if not given or not all(isinstance(batch, Mapping) for batch in given):
        raise LorakitError(f"{what} is a list of batches, not empty, each the arguments of one model(**batch).")
    return given


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
        with torch.no_grad():
            if isinstance(delta, LowRank):
                B, A = delta.gated()
                return Change.of(B.double() * delta.scale, A)
            # of the frozen weight, whatever is merged into it just now
            return Change.of(delta.dense(site.layout.matrix(self.adapter.layers[path].stored(site))))

    def leading(self, place: str, rank: int) -> Change:
        delta = self.at[place][2]
        chosen = delta.truncated(rank) if isinstance(delta, LowRank) else None
        if chosen is None:
            raise LorakitError(f"resize: {delta.spec.name} does not order its ranks; leave own out.")
        return Change.of(*chosen)

    def replaced(self) -> dict[str, Any]:
        return {path: replacement.tensors() for path, replacement in self.adapter.replacements()}

    def shift(self, place: str) -> Tensor | None:
        """What it adds to the bias of a matrix, in the place that the layer's bias has for it; None: nothing."""
        path, site, delta = self.at[place]
        with torch.no_grad():
            shift = self.adapter.layers[path].shift_of(site, delta)
            return shift if shift is None or not isinstance(site.layout, Rows) else site.layout.features(shift, shift)


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
        bundle: what the folder holds, with every expert's pair under a name of its own.
        stacks: parameter -> the stack of experts that these pairs are in the file.
        pairs: place -> the names of A and B in the file.
        wholes: place -> the name of ΔW.
    """

    def __init__(self, folder: str | Path, verb: str) -> None:
        self.bundle = read_bundle(folder)
        self.label = str(folder)
        where = self.bundle.folder / TENSORS
        if self.bundle.stale:
            raise LorakitError(self.bundle.stale)
        kind = needs_base(self.bundle.config)
        if kind:
            raise LorakitError(
                f"{verb}: {folder} holds {kind}, whose ΔW is not in the file but depends on the base model's layers. With its "
                f"base: lk.load it and give the adapter; on the command line give --base."
            )
        apart = unstack(self.bundle.tensors, self.bundle.config, f"{verb}: {where}", trusted=bool(self.bundle.own))
        self.bundle = replace(self.bundle, tensors=apart.tensors, config=apart.config)
        self.stacks = apart.stacks
        self.pairs: dict[str, tuple[str, str]] = {}
        self.wholes: dict[str, str] = {}
        self._replaced: dict[str, Tensor] = {}
        for key, tensor in self.bundle.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise LorakitError(f"{verb}: {key} in {where} holds a NaN or an infinity.")
            if found := pair_of(key):
                stem, *pair = found
                for other in pair:
                    if other not in self.bundle.tensors:
                        raise LorakitError(f"{verb}: {where} holds {key!r} and lacks its other half {other!r}.")
                self.pairs[stem.removeprefix(PREFIX)] = (pair[0], pair[1])
            elif key.endswith(WHOLE):
                self.wholes[key.removesuffix(WHOLE).removeprefix(PREFIX)] = key
            elif self._is_known(key):
                self._replaced[key] = tensor
            elif not self._is_copy(key):
                raise LorakitError(
                    f"{verb}: {where} holds {key!r}, which is no factor, no trained bias and in none of modules_to_save "
                    f"{self.bundle.config.get('modules_to_save') or []}."
                )
        for place in self.pairs:
            self._check_ranks(place, verb, where)
        if not self.places():
            raise LorakitError(f"{verb}: {where} changes no matrix.")

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

    def _check_ranks(self, place: str, verb: str, where: Path) -> None:
        config, (key_A, key_B) = self.bundle.config, self.pairs[place]
        rank, columns = self.bundle.tensors[key_A].shape[0], self.bundle.tensors[key_B].shape[1]
        if rank != columns:
            raise LorakitError(
                f"{verb}: the ranks of a pair do not match in {where}: {key_A} has {rank} rows, and {key_B} has "
                f"{columns} columns."
            )
        said = value_for(config.get("rank_pattern") or {}, place)
        said = config.get("r", rank) if said is None else said
        if said != rank:
            raise LorakitError(
                f"{verb}: the configuration of {self.label} says rank {said} for {place}, and {key_A} has {rank} rows, so "
                "that its scale is not known."
            )

    def places(self) -> list[str]:
        return [*self.pairs, *self.wholes]

    def change(self, place: str) -> Change:
        if place in self.wholes:
            return Change.of(self.bundle.tensors[self.wholes[place]])
        return self._cut(place, None)

    def leading(self, place: str, rank: int) -> Change:
        method = self.bundle.own.get("method", {}).get("name", "lora")
        if method != "dylora":
            raise LorakitError(
                f"resize: own keeps the ranks that the method itself puts first, and this folder's method is {method}. "
                "Without own the largest singular values are kept."
            )
        return self._cut(place, rank)

    def _cut(self, place: str, rank: int | None) -> Change:
        """The first ranks of a pair, with the scale that the file's alpha has for so many."""
        B, A = (self.bundle.tensors[key].flatten(1).double() for key in reversed(self.pairs[place]))
        A = A[:rank]
        return Change(B[:, : len(A)] * scale_in(self.bundle.config, place, len(A)), A)

    def replaced(self) -> dict[str, Any]:
        return self._replaced

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
