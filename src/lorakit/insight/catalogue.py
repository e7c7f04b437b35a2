"""The tables of methods and edits as data: what each is, and what it costs on given matrices or a model.

Made from the method cards and from the deltas themselves, so that `lorakit methods` and docs/methods.md say what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.adapter.targets import Targets, select
from lorakit.core.delta import Delta, Method, Pool, Shape, Spec
from lorakit.core.sites import sites_of
from lorakit.core.walking import walk
from lorakit.edits import EDITS
from lorakit.edits.contract import Anatomy, Block, EditMethod
from lorakit.errors import LorakitError
from lorakit.methods import METHODS

TRAINING_BYTES = 16
"""Per trained number: the float32 master, its gradient, and Adam's two moments, 4 bytes each."""


@dataclass(frozen=True)
class Entry:
    """One method or edit, and what it costs.

    Attributes:
        name: its name in files and on the command line.
        title, formula, paper, use, limits: from its card.
        parameters: trainable numbers in all, at its defaults; None where `reason` says why not.
        identity: whether it changes nothing before training.
        reason: why it does not fit at its defaults, if it does not.
    """

    name: str
    title: str
    formula: str
    paper: str
    use: str
    limits: str
    parameters: int | None
    identity: bool
    reason: str

    @property
    def training_bytes(self) -> int | None:
        """Memory for the adapter's own numbers while training with Adam, in bytes."""
        return None if self.parameters is None else self.parameters * TRAINING_BYTES


@dataclass(frozen=True)
class MethodEntry(Entry):
    """One method on given matrices. `form`: whether a server can batch it with others (`gain · y + bias + B A x`)."""

    form: bool


@dataclass(frozen=True)
class EditEntry(Entry):
    """One edit on a model. `flat`: whether it acts in flat rows of training."""

    flat: bool


def catalogue(shapes: Sequence[Shape]) -> list[MethodEntry]:
    """Every method of the table, with its cost on matrices of these shapes."""
    return [_method_entry(method, shapes) for method in METHODS.values()]


def _method_entry(method: type[Method], shapes: Sequence[Shape]) -> MethodEntry:
    card = method.card
    parameters, form, reason = None, False, ""
    try:
        spec = _default(method)
        for shape in dict.fromkeys(shapes):
            spec.check(shape, f"a layer of {shape.out} × {shape.in_}")
        parameters = sum(card.parameters(shape, spec) for shape in shapes)
        if card.pooled is not None:
            parameters += card.pooled(list(shapes), spec)
        small = Shape(16, 16, bias=True)
        form = type(spec.build(small, Pool([small]))).form is not Delta.form
    except LorakitError as problem:
        reason = str(problem)
    return MethodEntry(**_said(method), parameters=parameters, reason=reason, form=form)


SAMPLE = Anatomy(
    hidden=576,
    heads=9,
    key_heads=3,
    head_size=64,
    vocabulary=49152,
    blocks=tuple(
        Block(f"{number}", number, f"{number}.attention", (f"{number}.out",), (f"{number}.up", f"{number}.down"))
        for number in range(30)
    ),
    model_type="llama",
)
"""SmolLM2-135M, on which edits are counted where no model is given."""


def edits_catalogue(anatomy: Anatomy = SAMPLE) -> list[EditEntry]:
    """Every edit of the table, with its cost on a model of this anatomy."""
    return [_edit_entry(edit, anatomy) for edit in EDITS.values()]


def _edit_entry(edit: type[EditMethod], anatomy: Anatomy) -> EditEntry:
    parameters, reason = None, ""
    try:
        parameters = edit.card.parameters(anatomy, edit())
    except LorakitError as problem:
        reason = str(problem)
    return EditEntry(**_said(edit), parameters=parameters, reason=reason, flat=edit.needs_padding is None)


def entry_of(spec: type[Spec], shapes: Sequence[Shape], anatomy: Anatomy = SAMPLE) -> Entry:
    """One method, edit, mixture or router. What a mixture or a router costs depends on what it holds and is not counted."""
    if METHODS.get(spec.name) is spec:
        return _method_entry(METHODS[spec.name], shapes)
    if EDITS.get(spec.name) is spec:
        return _edit_entry(EDITS[spec.name], anatomy)
    return Entry(**_said(spec), parameters=None, reason="")


def _said(spec: type[Spec]) -> dict[str, Any]:
    """What a method or an edit says of itself."""
    card = {field: getattr(spec.card, field) for field in ("title", "formula", "paper", "use", "limits", "identity")}
    return {"name": spec.name, **card}


def _default(method: type[Method]) -> Method:
    """The spec at its defaults; IA3 asks which layers are feed-forward, and for counting none are."""
    try:
        return method()
    except (LorakitError, TypeError):
        return method(feedforward_modules=())  # type: ignore[call-arg]


def matrices(model: nn.Module, targets: Targets | None = None) -> dict[str, Shape]:
    """Path -> shape of every matrix that an adapter with these targets changes (all linear layers by default)."""
    modules = dict(walk(model))
    return {
        site.place(path): site.layout.shape
        for path in select(model, targets or Targets())
        for site in sites_of(modules[path])
    }
