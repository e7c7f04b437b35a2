"""The options of a run and of methods as rows: what `--help` and the documentation show of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.core.options import Declared
from lorakit.train.config.choices import CHOICES, Choice
from lorakit.train.config.document import dump
from lorakit.train.config.flags import Names
from lorakit.train.config.options import TrainConfig


@dataclass(frozen=True)
class ConfigField:
    """One option as the command line and the documentation show it.

    Attributes:
        name: dotted, as in the file: "train.max_steps"; the flag is `flag`.
        section: "", "data", "train", "evaluate", or "method" for the options of methods.
        heading: what it is shown under; of a method's option, the methods that have it.
        kind: the type and range in words.
        default: the default, plain; `dataclasses.MISSING` where the option is required.
        doc: one line.
        is_switch: whether the bare flag means true (and `--no-...` false).
        choices: the allowed words, if they are limited.
        pattern: the name by which it may differ per layer; empty where it may not.
    """

    name: str
    section: str
    heading: str
    kind: str
    default: Any
    doc: str
    is_switch: bool
    choices: tuple[str, ...]
    pattern: str

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
        return "" if self.is_required else dump({"x": self.default})[3:].strip()

    def as_data(self) -> dict[str, Any]:
        """Plain data; an option that is required has no default."""
        data = dataclasses.asdict(self)
        return {key: value for key, value in data.items() if key != "default" or not self.is_required}

    def told(self, whole: bool = False) -> str:
        """Its documentation in one line with its default; `whole`: with its type and range in any case."""
        is_unsaid = any(word not in self.doc for word in self.choices)
        notes = [self.kind] if whole or is_unsaid else []
        if self.is_required:
            notes.append("required")
        elif self.default_text not in ("[]", "{}") and (whole or self.default_text != "null" or "null" in self.doc):
            notes.append(f"default {self.default_text}")
        if self.pattern:
            notes.append(f"per layer: --{self.pattern.replace('_', '-')}")
        return f"{self.doc} ({'; '.join(notes)})" if notes else self.doc


def run_fields() -> Iterator[ConfigField]:
    """The options of a run, without those of its method."""
    for name, heading, declared in TrainConfig.options():
        yield _field(name, name.rpartition(".")[0], heading, declared, CHOICES.get(name))


def choice_fields(kind: str, name: str) -> Iterator[ConfigField]:
    """The options of one method, start or format (`kind` is "method", ...), those of the specs that it holds among them."""
    choice = CHOICES[kind]
    spec = choice.table()[name]
    for option, declared in choice.reachable(spec).items():
        yield _field(option, kind, name, declared, choice.inner(spec).get(option))


def config_fields() -> Iterator[ConfigField]:
    """Every option of a run, with those of all methods under their short names (`rank`, not `method.rank`)."""
    yield from run_fields()
    for name, owners in Names().of_methods.items():
        first, declared = owners[0]
        inner = CHOICES["method"].inner(CHOICES["method"].table()[first])
        yield _field(name, "method", ", ".join(method for method, _ in owners), declared, inner.get(name))


def _field(name: str, section: str, heading: str, declared: Declared, choice: Choice | None) -> ConfigField:
    default, option = declared.default, declared.option
    if choice and not (default is None or isinstance(default, str)):
        default = choice.name_of(default)
    return ConfigField(
        name,
        section,
        heading,
        choice.shown if choice else declared.words.replace("None", "null"),
        list(default) if isinstance(default, tuple) else default,
        option.doc,
        declared.type is bool,
        declared.choices,
        f"{declared.name}_pattern" if option.pattern else "",
    )
