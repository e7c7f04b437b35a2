"""The options of a spec or of a run, declared once: type, default, range, one line of documentation, and PEFT's name.

    rank: int = option(16, "columns of B and rows of A", minimum=1, peft="r", pattern="rank_pattern")

Everything that speaks of options follows from the declaration: checking, reading and writing PEFT's configuration, patterns per
layer, flags, `--help`, the YAML's comments and the tables of the pages.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Option:
    """What is declared beside the default of a field.

    Attributes:
        doc: one line; it begins in lower case and has no full stop at its end.
        minimum, above, maximum, below: inclusive and exclusive bounds of a number, or of each number of a list.
        peft: its name in PEFT's adapter_config.json; None where PEFT has no such entry.
        peft_default: what that entry means where a file lacks it; `...` where that is our own default.
        from_peft, to_peft: the option's value from the entry's, and back; None where they are the same.
        pattern: PEFT's name of the mapping by which it may differ per layer ("rank_pattern"); None where it may not. One that
            PEFT does not have is the option's own name with "_pattern".
        allows: whether a value of the right type and range may be taken; `shown` then says which may.
        shown: how the type is named to people, where the annotation would not help.
        reader, writer: how the plain value of YAML or a flag is read and written, where the type does not say.
    """

    doc: str = ""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    peft: str | None = None
    peft_default: Any = ...
    from_peft: Callable[[Any], Any] | None = None
    to_peft: Callable[[Any], Any] | None = None
    pattern: str | None = None
    allows: Callable[[Any], bool] | None = None
    shown: str = ""
    reader: Callable[..., Any] | None = None
    writer: Callable[[Any], Any] | None = None

    @property
    def bounds(self) -> str:
        """The range in words: "at least 1 and below 2"; empty where there is none."""
        words = [
            f"{word} {bound:g}"
            for word, bound in (
                ("at least", self.minimum),
                ("above", self.above),
                ("at most", self.maximum),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " and ".join(words)

    def holds(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )


@dataclass(frozen=True)
class Declared:
    """One option of a class: its name, its resolved type, its default (`dataclasses.MISSING` where required), and the rest."""

    name: str
    type: Any
    default: Any
    option: Option

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, if the type is a Literal."""
        return tuple(typing.get_args(self.type)) if typing.get_origin(self.type) is Literal else ()

    @property
    def words(self) -> str:
        """What it takes: "an integer of at least 1"."""
        if self.option.shown:
            return self.option.shown
        bounds = self.option.bounds
        if bounds:
            bounds = f" of {bounds}" if bounds.startswith("at") else f" {bounds}"
        parts = typing.get_args(self.type)
        if typing.get_origin(self.type) in (Union, types.UnionType) and type(None) in parts:
            return " or ".join(describe(part) for part in parts if part is not type(None)) + f"{bounds}, or None"
        return describe(self.type) + bounds

    def takes(self, value: Any) -> bool:
        """Whether a value has the type, is within the range, and is allowed."""
        numbers = value if isinstance(value, tuple | list) else (value,)
        return (
            _fits(value, self.type)
            and all(self.option.holds(n) for n in numbers if isinstance(n, int | float) and not isinstance(n, bool))
            and (self.option.allows is None or self.option.allows(value))
        )


def option(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    **declared: Any,
) -> Any:
    """A dataclass field with its declaration; `declared` are further attributes of `Option`."""
    metadata = {"option": Option(doc, **declared)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_DECLARED: dict[type, Mapping[str, Declared]] = {}


def options_of(spec: type) -> Mapping[str, Declared]:
    """The options of a class in the order of its fields. Kept: flags ask for them thousands of times."""
    if spec not in _DECLARED:
        hints = typing.get_type_hints(spec)
        _DECLARED[spec] = {
            field.name: Declared(
                field.name,
                hints[field.name],
                field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
                field.metadata.get("option", Option()),
            )
            for field in dataclasses.fields(spec)
        }
    return _DECLARED[spec]


def docs(spec: type) -> dict[str, str]:
    """The one-line documentation of every option of a class."""
    return {name: declared.option.doc for name, declared in options_of(spec).items()}


def patterns_of(spec: type) -> Mapping[str, str]:
    """The options of a class that may differ per layer: name -> PEFT's name of the mapping that says so."""
    return {name: one.option.pattern for name, one in options_of(spec).items() if one.option.pattern is not None}


def describe(hint: Any) -> str:
    """A type in words: `int | None` is "an integer or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}"
    if origin in (tuple, list):
        return "a list of " + {int: "integers", float: "numbers", str: "names"}.get(arguments[0], "values")
    if origin in (dict, Mapping):
        held = {int: "integers", float: "numbers", str: "text"}
        return "a mapping from names to " + held.get(arguments[1], "values")
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def check(spec: Any, name: str) -> None:
    """Raise LorakitError for the first option of `spec` that has another type or is out of range; `name` is what it is of."""
    for declared in options_of(type(spec)).values():
        value = getattr(spec, declared.name)
        if not declared.takes(value):
            raise LorakitError(f"{name}: {declared.name} was given as {value!r}; it is {declared.words}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; an integer is a number, true and false are neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is tuple:
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint) if isinstance(hint, type) else True
