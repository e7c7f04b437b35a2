"""The method table as data: what each method is, and what it costs on given matrices.

Made from the method cards and from the deltas themselves, so that `lorakit methods` and docs/methods.md say what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.delta import Delta, Method, Pool, Shape
from lorakit.edit import Anatomy, Block
from lorakit.edits import EDITS
from lorakit.errors import LorakitError
from lorakit.layout import sites_of
from lorakit.methods import METHODS
from lorakit.targets import Targets, select, walk

TRAINING_BYTES = 16
"""Per trained number: the float32 master, its gradient, and Adam's two moments, 4 bytes each."""


@dataclass(frozen=True)
class Entry:
    """One method on given matrices.

    Attributes:
        name: its name in files and on the command line.
        title, formula, paper, use, limits: from its card.
        parameters: trainable numbers in all, at the method's defaults; None where `reason` says why not.
        form: whether a server can batch it with others (`gain · y + bias + B A x`).
        identity: whether it changes nothing before training.
        peft: PEFT's name of the same method, or None.
        reason: why the method does not fit these matrices at its defaults, if it does not.
    """

    name: str
    title: str
    formula: str
    paper: str
    use: str
    limits: str
    parameters: int | None
    form: bool
    identity: bool
    peft: str | None
    reason: str = ""

    @property
    def training_bytes(self) -> int | None:
        """Memory for the adapter's own numbers while training with Adam, in bytes."""
        return None if self.parameters is None else self.parameters * TRAINING_BYTES


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


@dataclass(frozen=True)
class EditEntry:
    """One edit on a model: `parameters` at its defaults; the rest is from its card, as in `Entry`."""

    name: str
    title: str
    formula: str
    paper: str
    use: str
    limits: str
    parameters: int | None
    identity: bool
    peft: str | None
    flat: bool
    reason: str = ""

    @property
    def training_bytes(self) -> int | None:
        """Memory for the edit's own numbers while training with Adam, in bytes."""
        return None if self.parameters is None else self.parameters * TRAINING_BYTES


def edits_catalogue(anatomy: Anatomy = SAMPLE) -> list[EditEntry]:
    """Every edit of the table, with its cost on a model of this anatomy."""
    entries = []
    for name, edit in EDITS.items():
        card, parameters, reason = edit.card, None, ""
        try:
            parameters = card.parameters(anatomy, edit())
        except LorakitError as problem:
            reason = str(problem)
        entries.append(
            EditEntry(
                name=name,
                title=card.title,
                formula=card.formula,
                paper=card.paper,
                use=card.use,
                limits=card.limits,
                parameters=parameters,
                identity=card.identity,
                peft=edit.peft_type,
                flat=edit.flat is None,
                reason=reason,
            )
        )
    return entries


def matrices(model: nn.Module, targets: Targets | None = None) -> dict[str, Shape]:
    """Path -> shape of every matrix that an adapter with these targets changes (all linear layers by default)."""
    modules = dict(walk(model))
    return {
        site.place(path): site.layout.shape
        for path in select(model, targets or Targets())
        for site in sites_of(modules[path])
    }


def catalogue(shapes: Sequence[Shape]) -> list[Entry]:
    """Every method of the table, with its cost on matrices of these shapes."""
    return [_entry(name, method, shapes) for name, method in METHODS.items()]


def _entry(name: str, method: type[Method], shapes: Sequence[Shape]) -> Entry:
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
    return Entry(
        name=name,
        title=card.title,
        formula=card.formula,
        paper=card.paper,
        use=card.use,
        limits=card.limits,
        parameters=parameters,
        form=form,
        identity=card.identity,
        peft=method.peft_type,
        reason=reason,
    )


def _default(method: type[Method]) -> Method:
    """The spec at its defaults; IA3 asks which layers are feed-forward, and for counting none are."""
    try:
        return method()
    except (LorakitError, TypeError):
        return method(feedforward_modules=())  # type: ignore[call-arg]
