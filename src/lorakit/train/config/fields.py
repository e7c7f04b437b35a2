"""The options of a run as data: what a command line makes flags of, and documentation its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.train.config.choices import inner_classes, methods, option_docs, option_names, write_method
from lorakit.train.config.document import dump
from lorakit.train.config.options import TrainConfig
from lorakit.train.config.schema import default_of, describe, hints_of, iterate, plain


@dataclass(frozen=True)
class ConfigField:
    """One option as the command line and the documentation show it.

    Attributes:
        name: dotted, as in the file: "train.max_steps"; the flag is `flag`.
        section: "", "data", "train", "evaluate", or "method" for the options of methods.
        kind: the type in words.
        default: the default; `dataclasses.MISSING` where the option is required.
        doc: one line.
        is_switch: whether the bare flag means true (and `--no-...` false).
        choices: the allowed words, if they are limited.
    """

    name: str
    section: str
    kind: str
    default: Any
    doc: str
    is_switch: bool = False
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """The flag: "--train.max-steps"."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_required(self) -> bool:
        """Whether a run cannot start without it."""
        return self.default is dataclasses.MISSING

    @property
    def default_text(self) -> str:
        """The default as YAML would write it; empty when required."""
        return "" if self.is_required else dump({"x": plain(self.default)})[3:].strip()


def config_fields() -> Iterator[ConfigField]:
    """Every option of a run, with those of all methods under their short names (`rank`, not `method.rank`)."""
    yield from _fields()
    table = methods()
    taken = {name for name, _, _ in iterate(TrainConfig)}
    owners: dict[str, list[tuple[str, type]]] = {}
    for method, spec in table.items():
        for name, owner in option_names(spec, table).items():
            if name not in taken:
                owners.setdefault(name, []).append((method, owner))
    for name, users in owners.items():
        spec = users[0][1]
        field = next(field for field in dataclasses.fields(spec) if field.name == name)
        hint, default = hints_of(spec)[name], default_of(field)
        kind = describe(hint)
        if name in inner_classes(spec, table):
            kind, default = "a method", write_method(default)
        doc = option_docs(spec).get(name, "").rstrip(".")
        doc = f"{doc} ({', '.join(method for method, _ in users)})".strip()
        yield ConfigField(name, "method", kind, default, doc, hint is bool, _choices(hint))


def _fields() -> Iterator[ConfigField]:
    for name, field, hint in iterate(TrainConfig):
        default = default_of(field)
        if default is not dataclasses.MISSING and field.metadata["writer"]:
            default = field.metadata["writer"](default)
        kind = field.metadata["shown"] or describe(hint)
        section = name.rpartition(".")[0]
        yield ConfigField(name, section, kind, default, field.metadata["doc"], hint is bool, _choices(hint))


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(hint.__args__) if getattr(hint, "__origin__", None) is Literal else ()
