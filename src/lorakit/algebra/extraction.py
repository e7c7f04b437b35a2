"""A LoRA out of a fine-tuned model and its base: the best low-rank approximation of what the tuning did to every layer.

ΔW = W' - W is cut per layer, to one rank or to the least rank that holds a share of its energy. A full fine-tune changes
weights in all directions, so that a small rank keeps the strongest of them; a merged LoRA comes out at its own rank, but for
the floor that rounding the merged weights to bfloat16 leaves (about 2⁻⁹ of |W|, of full rank: give a rank then, or an energy
below 1). What no low-rank change can say (norms, biases, embeddings, an output head) is kept whole as modules_to_save and
trained biases, or reported.

Folders of safetensors are read tensor by tensor; what is in memory is one layer of each model, and the factors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.adapter.construction import build
from lorakit.adapter.targets import Targets, select
from lorakit.algebra.changes import Change, Cut, cut
from lorakit.algebra.outcome import Made, method_for, report
from lorakit.core.sites import sites_of
from lorakit.core.spectrum import check_request
from lorakit.core.walking import walk
from lorakit.errors import LorakitError
from lorakit.files.prompt import tuned_prompt
from lorakit.files.store import save
from lorakit.models.checkpoint import Checkpoint, Named
from lorakit.models.stored import skeleton

log = logging.getLogger("lorakit")

RESTS = ("save", "report", "refuse")


@dataclass(frozen=True)
class Extracted:
    """What an extraction found.

    Attributes:
        made: the adapter and what its cuts cost.
        unchanged: layers that the tuning left alone; they are not adapted.
        saved: tensor -> ‖W' - W‖ / ‖W‖ of what is kept whole.
        left: the same of what the adapter leaves out.
    """

    made: Made
    unchanged: tuple[str, ...]
    saved: dict[str, float]
    left: dict[str, float]


Progress = Callable[[int, int, str], None]


def extract(
    base: nn.Module | str | Path,
    tuned: nn.Module | str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    target_modules: str | Iterable[str] = "all-linear",
    exclude_modules: str | Iterable[str] | None = None,
    rest: str = "save",
    name: str = "extracted",
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Make a LoRA of the difference between two models of one architecture.

    Of two models in memory the adapter is put on the base, inactive; of two folders it is written to `output`, and no model
    is loaded.

    Args:
        base, tuned: two models, or two folders with config.json and safetensors (sharded or not).
        rank: of every layer; a layer whose change has less gets what it has.
        energy: instead, the share of each layer's squared singular values to keep; 1.0 keeps all.
        target_modules, exclude_modules: the layers to make low-rank, as for `attach`.
        rest: what becomes of other tensors that differ: "save" keeps them whole with the adapter, "report" leaves them out
            and says which, "refuse" raises.
        name: of the adapter on the base.
        output: the folder to write, for folders.
        progress: called with (done, all, layer) as layers go by.

    Raises:
        LorakitError: they are not of one architecture, a tensor is missing, has another shape, or holds a NaN; nothing differs;
            nothing has been written then.
    """
    check_request(rank, energy, "extract")
    if rest not in RESTS:
        raise LorakitError(f"extract: rest was given as {rest!r}; it is one of {', '.join(RESTS)}.")
    model, ours, theirs = _opened(base, tuned, output)
    asked = Targets(
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        exclude_modules=exclude_modules
        if exclude_modules is None or isinstance(exclude_modules, str)
        else tuple(exclude_modules),
    )
    modules = dict(walk(model))
    paths = select(model, asked)
    cuts: dict[str, Cut] = {}
    unchanged: list[str] = []
    seen: set[str] = set()
    adapted: dict[str, None] = {}
    for index, path in enumerate(paths):
        if progress is not None:
            progress(index, len(paths), path)
        for site in sites_of(modules[path]):
            key, place = f"{path}.{site.weight}", site.place(path)
            seen.add(key)
            found = _difference(ours, theirs, key)
            if found is None:
                unchanged.append(place)
                continue
            cuts[place] = cut(Change.of(site.layout.matrix(found[1])), rank, energy)
            adapted[path] = None
    differing = {}
    for key in model.state_dict():
        if key not in seen and (key in ours or key in theirs) and (found := _difference(ours, theirs, key)) is not None:
            size = float(found[0].norm())
            differing[key] = float(found[1].norm()) / size if size else 1.0
    unknown = {key: 1.0 for key in theirs.unnamed() if not _same(ours.source, theirs.source, key)}
    if unknown:
        log.warning(
            "extract: %s (%d such tensors) differs between the folders, and a %s has no tensor of that name; left out.",
            next(iter(unknown)),
            len(unknown),
            type(model).__name__,
        )
    if not cuts and not differing:
        raise LorakitError("extract: the two models do not differ in any tensor.")
    if not cuts:
        raise LorakitError(
            f"extract: none of the {len(paths)} targeted layers differs; what differs is for example {next(iter(differing))}. "
            "Name layers that do (target_modules, --target)."
        )
    others = {**differing, **unknown}
    if others and rest == "refuse":
        raise LorakitError(
            f"extract: {next(iter(others))} and {len(others) - 1} other tensors differ that are no targeted matrix; "
            "rest 'save' keeps them whole, 'report' leaves them out."
        )
    keep = rest == "save"
    saved, left = (differing, unknown) if keep else ({}, others)
    biases, whole = _whole(modules, saved, adapted)
    adapter = _filled(model, name, cuts, biases, whole, theirs, list(adapted))
    told = report(cuts, "extracted", {"from": str(tuned), "rank": rank, "energy": energy, "left": left})
    if output is None:
        return Extracted(replace(told, adapter=adapter), tuple(unchanged), saved, left)
    prompt = tuned_prompt(*(cast(Checkpoint, side.source).folder for side in (ours, theirs)))
    if prompt is not None:
        log.info("extract: the tuned model is asked by %s, which goes with the adapter", prompt.place)
    folder = save(adapter, output, base=str(base), record=told.record, stored_weight=ours.__getitem__, prompt=prompt)
    return Extracted(replace(told, folder=folder), tuple(unchanged), saved, left)


def _opened(base: Any, tuned: Any, output: Any) -> tuple[nn.Module, Named, Named]:
    """The model that the names are of, and both sides' tensors under these names."""
    if isinstance(base, nn.Module) and isinstance(tuned, nn.Module):
        if output is not None:
            raise LorakitError("extract: models give an adapter on the base; save that, and leave output out.")
        if adapters(base) or adapters(tuned):
            raise LorakitError("extract: one of the models has adapters on it; lk.merge or lk.detach them first.")
        return base, Named(base, base), Named(tuned, tuned if type(base) is type(tuned) else base)
    if isinstance(base, nn.Module) or isinstance(tuned, nn.Module):
        raise LorakitError("extract: give two models, or two folders; one of each was given.")
    if output is None:
        raise LorakitError("extract: folders were given, so output= names the folder to write.")
    ours, theirs = Checkpoint(base, "extract"), Checkpoint(tuned, "extract")
    for folder in (ours.folder, theirs.folder):
        if not (folder / "config.json").is_file():
            raise LorakitError(f"extract: {folder} has no config.json, which says what its tensors are the weights of.")
    model, other = skeleton(ours.folder), skeleton(theirs.folder)
    if type(model) is not type(other):
        raise LorakitError(
            f"extract: {base} is a {type(model).__name__} and {tuned} a {type(other).__name__}; a base and its fine-tune are "
            "of one architecture."
        )
    named = Named(ours, model)
    first = next(iter(named.names), None)
    if first is not None:
        model.to(dtype=named[first].dtype)
    return model, Named(ours, model), Named(theirs, other)


def _same(base: Any, tuned: Any, key: str) -> bool:
    """Whether both folders hold the same tensor; of a model in memory every tensor has a name."""
    if not isinstance(tuned, Checkpoint):
        return True
    return key in base.files and torch.equal(base.read(key), tuned.read(key))


def _difference(ours: Named, theirs: Named, key: str) -> tuple[Tensor, Tensor] | None:
    """W and W' - W in float64, read one tensor at a time; None where they are equal."""
    sides = {"base": ours, "tuned model": theirs}
    for side, named in sides.items():
        if key not in named:
            raise LorakitError(
                f"extract: the {side} holds no tensor {key!r}; both must be whole and of one architecture."
            )
    before, after = ours[key], theirs[key]
    if before.shape != after.shape:
        raise LorakitError(
            f"extract: {key} is {tuple(before.shape)} in the base and {tuple(after.shape)} in the tuned model (a resized "
            "vocabulary?); their difference is no change of it. Leave the layer out (exclude_modules, --exclude)."
        )
    for side, tensor in zip(sides, (before, after), strict=True):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LorakitError(f"extract: {key} of the {side} holds a NaN or an infinity.")
    return None if torch.equal(before, after.to(before)) else (before.double(), after.double() - before.double())


def _whole(modules: dict[str, nn.Module], differing: Iterable[str], adapted: Iterable[str]) -> tuple[bool, list[str]]:
    """Whether biases of adapted layers are among these tensors, and the modules of the others, to be kept whole."""
    biases, whole = False, dict[str, None]()
    for key in differing:
        owner, _, tensor = key.rpartition(".")
        while owner and owner not in modules:  # within nn.MultiheadAttention, which is one layer
            owner = owner.rpartition(".")[0]
        if "bias" in tensor and any(key.startswith(f"{path}.") for path in adapted):
            biases = True
            continue
        if any(path.startswith(f"{owner}.") for path in modules):
            raise LorakitError(
                f"extract: {key} differs and stands in a {type(modules[owner]).__name__} with layers of its own, so that "
                "it cannot be kept alone; rest 'report' leaves it out."
            )
        whole[owner] = None
    return biases, list(whole)


def _filled(
    model: nn.Module, name: str, cuts: dict[str, Cut], biases: bool, whole: list[str], theirs: Named, paths: list[str]
) -> Adapter:
    """The adapter on the model, or on its skeleton, with its tensors."""
    spec, patterns = method_for(cuts)
    bias = "lora_only" if biases else "none"
    targets = Targets(target_modules=tuple(paths), modules_to_save=tuple(whole), bias=bias, patterns=patterns)
    adapter = build(model, spec, targets, name, checked=False, paths=paths)
    for path, site, delta in adapter.deltas():
        place = site.place(path)
        for letter in ("B", "A"):
            own = getattr(delta, letter)
            _put(delta, letter, getattr(cuts[place].change, letter) if place in cuts else torch.zeros(own.shape))
    for path, replacement in adapter.replacements():
        for key in replacement.names:
            _put(replacement, replacement.attribute(key), theirs[f"{path}.{key}"])
    return adapter


def _put(holder: nn.Module, attribute: str, value: Tensor) -> None:
    """A value into a tensor, or in the place of one on the meta device, which holds none."""
    before: Any = getattr(holder, attribute)
    if not before.is_meta:
        before.data.copy_(value)
        return
    fresh = value.to(dtype=before.dtype).clone()
    setattr(holder, attribute, nn.Parameter(fresh, requires_grad=False) if isinstance(before, nn.Parameter) else fresh)
