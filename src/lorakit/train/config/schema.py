"""Typed reading of YAML and of flags into frozen dataclasses: one rule for types, ranges, names and where they
stood.

A section of a run's configuration is a frozen dataclass whose fields are made with `option`, which keeps the
one-line doc and the allowed range beside the default. `build` turns a tree of plain values into such a
dataclass and refuses what does not fit, naming the option and the line or flag it came from. `check` is what
a section calls when it is made in Python, so that both doors share one lock.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from lorakit.errors import LorakitError, unknown
from lorakit.train.config.document import parse_value

T = TypeVar("T")
Reader = Callable[[Any, str, "Origins"], Any]


class FlagText(str):
    """A value from the command line: text that is read by the type of its option, not by YAML's guess."""

    __slots__ = ()


@dataclass(frozen=True)
class Origins:
    """Where each option was given: dotted name to "file, line 3" or "--flag"; for error messages alone."""

    places: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, name: str) -> str:
        """The place of `name`, or of the nearest section around it; empty when it came from Python."""
        while name:
            if name in self.places:
                return self.places[name]
            name = name.rpartition(".")[0]
        return self.places.get("", "")

    def suffix(self, name: str) -> str:
        """The place in brackets, ready to end a message."""
        place = self.of(name)
        return f" ({place})" if place else ""


NOWHERE = Origins()


def option(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    reader: Reader | None = None,
    writer: Callable[[Any], Any] | None = None,
    shown: str = "",
) -> Any:
    """A dataclass field with its documentation and range.

    Args:
        default: the default; leave out for a required option.
        doc: one line, shared by `--help`, the generated docs and the comments of the YAML.
        factory: makes the default where it is not a constant.
        minimum, above, maximum, below: inclusive and exclusive bounds of a number (`None` values are not checked).
        reader: reads the plain value where the type alone does not say how: `reader(value, name, origins)`.
        writer: the plain value again, for YAML.
        shown: how the type is named to people, where the annotation would not help.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"doc": doc, "reader": reader, "writer": writer, "shown": shown, **bounds}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def hints_of(cls: type) -> Mapping[str, Any]:
    """The resolved annotations of a dataclass, in field order. Kept: reading flags asks thousands of times."""
    if cls not in _HINTS:
        resolved = typing.get_type_hints(cls)
        _HINTS[cls] = {field.name: resolved[field.name] for field in dataclasses.fields(cls)}
    return _HINTS[cls]


_HINTS: dict[type, Mapping[str, Any]] = {}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; `dataclasses.MISSING` when it is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# Types -------------------------------------------------------------------------------------------------------------


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
    if origin is dict:
        return "a mapping from names to " + {int: "integers", float: "numbers"}.get(arguments[1], "values")
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


class _MismatchError(Exception):
    """The value is not of the type; turned into a LorakitError with name and place by `read`."""


def read(value: Any, hint: Any, name: str, origins: Origins = NOWHERE) -> Any:
    """`value` as the type `hint`, normalised (lists become tuples, integers become floats where a float is asked).

    Raises:
        LorakitError: the value is of another type; says what was expected, what was found and where.
    """
    try:
        return _read(value, hint)
    except _MismatchError:
        near = ""
        choices = [str(c) for part in _parts(hint) if typing.get_origin(part) is Literal for c in typing.get_args(part)]
        if isinstance(value, str) and (close := difflib.get_close_matches(value, choices, n=1)):
            near = f'; did you mean "{close[0]}"?'
        found = str(value) if isinstance(value, bool | int | float) or value is None else repr(_text(value))
        found = {"None": "nothing", "True": "true", "False": "false"}.get(found, found)
        place = origins.suffix(name)
        raise LorakitError(f"{name}: expected {describe(hint)}, found {found}{place}{near}") from None


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, FlagText) else value


def _parts(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _read(value: Any, hint: Any, alone: bool = True) -> Any:
    if hint is Any:
        return parse_value(value) if isinstance(value, FlagText) else value
    parts = _parts(hint)
    if len(parts) > 1:
        # Text fits every option that may be text, so it is asked last; null first.
        order = sorted(parts, key=lambda part: {type(None): 0, bool: 1, int: 2, float: 3, str: 9}.get(part, 5))
        for part in order:
            try:
                return _read(value, part, alone=False)
            except _MismatchError:
                continue
        raise _MismatchError
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for choice in arguments:
            if str(value) == choice if isinstance(value, FlagText) else value is choice or value == choice:
                return choice
        raise _MismatchError
    if origin in (tuple, list):
        return _read_sequence(value, arguments, alone)
    if origin is dict:
        value = parse_value(value) if isinstance(value, FlagText) else value
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _MismatchError
        return {str(key): _read(item, arguments[1]) for key, item in value.items()}
    return _read_scalar(value, hint)


def _read_sequence(value: Any, arguments: tuple[Any, ...], alone: bool) -> tuple[Any, ...]:
    """A list; where nothing but a list is asked (`alone`), one value is a list of one."""
    lifts = alone and arguments[-1] is Ellipsis
    if isinstance(value, FlagText):
        if value.lstrip().startswith("["):
            value = parse_value(value)
        elif re.fullmatch(r"[^\s,\[\](){}*+?|\\^$]+(\s*,\s*[^\s,\[\](){}*+?|\\^$]+)+", value):
            value = [FlagText(item.strip()) for item in value.split(",")]  # `--layers 0,1,2`; a regex is not a list
        elif lifts and not value.lstrip().startswith("{"):
            value = [value]
    elif lifts and isinstance(value, str | int | float) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list | tuple):
        raise _MismatchError
    if arguments[-1] is Ellipsis:
        return tuple(_read(item, arguments[0]) for item in value)
    if len(value) != len(arguments):
        raise _MismatchError
    return tuple(_read(item, part) for item, part in zip(value, arguments, strict=True))


def _read_scalar(value: Any, hint: Any) -> Any:
    flag = isinstance(value, FlagText)
    if hint is str:
        if isinstance(value, str):
            return str(value)
        raise _MismatchError
    if flag:
        value = {"none": None, "null": None, "true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str) and hint in (int, float):
            value = parse_value(value)
    if hint is type(None) and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise _MismatchError


def check_range(value: Any, metadata: Mapping[str, Any], name: str, origins: Origins = NOWHERE) -> None:
    """Refuses a number outside the bounds in an option's metadata."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    tests: list[tuple[str, str, Callable[[float, float], bool]]] = [
        ("minimum", "at least", lambda number, bound: number >= bound),
        ("above", "above", lambda number, bound: number > bound),
        ("maximum", "at most", lambda number, bound: number <= bound),
        ("below", "below", lambda number, bound: number < bound),
    ]
    stated = [(words, metadata[key], holds) for key, words, holds in tests if metadata.get(key) is not None]
    if not all(holds(value, bound) for _, bound, holds in stated):
        asked = " and ".join(f"{words} {bound:g}" for words, bound, _ in stated)
        raise LorakitError(f"{name}: expected a number {asked}, found {value:g}{origins.suffix(name)}")


# Dataclasses -------------------------------------------------------------------------------------------------------


def read_field(field: dataclasses.Field[Any], hint: Any, value: Any, name: str, origins: Origins = NOWHERE) -> Any:
    """One option's value, by its own reader or by its type, within its range."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and field.metadata.get("reader") is None:
        return value if isinstance(value, hint) else build(hint, value, name, origins)
    reader = field.metadata.get("reader")
    result = reader(value, name, origins) if reader else read(value, hint, name, origins)
    check_range(result, field.metadata, name, origins)
    return result


def check(section: Any, prefix: str = "") -> None:
    """Validates and normalises a dataclass that was made in Python; to be called in its `__post_init__`."""
    hints = hints_of(type(section))
    for field in dataclasses.fields(section):
        name = f"{prefix}.{field.name}" if prefix else field.name
        value = read_field(field, hints[field.name], getattr(section, field.name), name)
        object.__setattr__(section, field.name, value)


def build(cls: type[T], tree: Any, prefix: str = "", origins: Origins = NOWHERE) -> T:
    """Makes the dataclass `cls` from plain values, refusing unknown names, wrong types and missing options.

    Raises:
        LorakitError: with the dotted name, the nearest known one, and the place.
    """
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        found = repr(_text(tree))
        raise LorakitError(f"{prefix}: expected a section with options, found {found}{origins.suffix(prefix)}")
    hints = hints_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            name = f"{prefix}.{key}" if prefix else str(key)
            known = [f"{prefix}.{field}" if prefix else field for field in fields]
            raise unknown("option", name, known, where=origins.of(name) or None)
    values = {}
    for key, field in fields.items():
        name = f"{prefix}.{key}" if prefix else key
        if key in tree:
            values[key] = read_field(field, hints[key], tree[key], name, origins)
        elif dataclasses.is_dataclass(hints[key]) and isinstance(hints[key], type):
            values[key] = build(hints[key], {}, name, origins)
        elif default_of(field) is dataclasses.MISSING:
            raise LorakitError(
                f"{name} is missing{origins.suffix(name)}: {field.metadata.get('doc') or describe(hints[key])}; "
                f"add it to the file or give --{name.replace('_', '-')}"
            )
    return cls(**values)


def plain(value: Any) -> Any:
    """A value as YAML has it: tuples as lists."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def iterate(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every option of a dataclass and of its sections: dotted name, field, type."""
    hints = hints_of(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}.{field.name}" if prefix else field.name
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and field.metadata.get("reader") is None:
            yield from iterate(hint, name)
        else:
            yield name, field, hint
