"""What the sections of a run's configuration share: strict reading, the text of flags, and errors that name option and place.

A section is a frozen pydantic model. Every value is read by one rule, whether it comes from a file, a flag or Python, and what
does not fit is a `LorakitError` that says the option, what was expected, what was found, and the line or flag it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from lorakit.core.options import Declared, Option
from lorakit.errors import LorakitError, unknown
from lorakit.train.config.document import parse_value

PLACE = "{place}"
"""Stands in a message where the file and line or the flag go, if they are known."""

_LIST = re.compile(r"[^\s,\[\](){}*+?|\\^$]+(\s*,\s*[^\s,\[\](){}*+?|\\^$]+)+")
"""`0,1,2`, which is a list; a regular expression with a comma is not."""


class FlagText(str):
    """A value from the command line: text that is read by the type of its option, not by YAML's guess."""

    __slots__ = ()


def rule(text: str, *name: str) -> PydanticCustomError:
    """The error of a rule about options; `text` is the whole message, `name` the option below this section to blame."""
    return PydanticCustomError("rule", "{text}", {"text": text, "name": name})


def mismatch(expected: str, found: str, more: str = "", *name: str) -> PydanticCustomError:
    """The error of a value that does not fit, whose message begins with the option's name."""
    text = f"expected {expected}, found {found}{more}"
    return PydanticCustomError("mismatch", "{text}", {"text": text, "name": name})


class Section(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Options that belong together: fields with a type, a default, a range (`ge=`, ...) and a line of documentation."""

    SECTION: ClassVar[str] = ""
    """What stands before the names of its options: "train"."""
    HEADINGS: ClassVar[Mapping[str, str]] = {}
    """Option -> the heading under which it and those after it are shown."""

    def __init__(self, /, **values: Any) -> None:
        try:
            self.__pydantic_validator__.validate_python(values, self_instance=self)
        except ValidationError as error:
            raise explained(error, self.SECTION, {}) from None

    # Sections inside a section are read in one go, so that an error names the option by its whole name.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, dots as double underscores: `config.replace(train__max_steps=5)`."""
        values: dict[str, Any] = dict(self)
        for key, value in changes.items():
            section, dots, name = key.partition("__")
            values[section] = {**dict(values[section]), name: value} if dots else value
        return type(self)(**values)

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        """Refuses unknown names and missing options; an empty section is one with the defaults."""
        if values is None or isinstance(values, cls):
            return values or {}
        if not isinstance(values, Mapping):
            raise mismatch("a section with options", shown(values))
        for key in values:
            if key not in cls.model_fields:
                raise rule(str(unknown("option", cls.dotted(key), map(cls.dotted, cls.model_fields), PLACE)), key)
        for key, info in cls.model_fields.items():
            if info.is_required() and key not in values:
                name = cls.dotted(key)
                how = f"add it to the file or give --{name.replace('_', '-')}"
                raise rule(f"{name} is missing: {info.description}; {how}", key)
        return values

    @field_validator("*", mode="wrap")
    @classmethod
    def _reading(cls, value: Any, handler: Any, info: ValidationInfo) -> Any:
        """The value by the option's type: the first of its readings that fits."""
        field = cls.model_fields[str(info.field_name)]
        if inner_section(field) or field.annotation is Any:  # these have errors of their own
            return handler(value)
        for reading in readings(value):
            try:
                return handler(reading)
            except ValidationError:
                continue
        raise unfit(declared_by(field), value)

    @classmethod
    def dotted(cls, name: str) -> str:
        """The whole name of one of its options."""
        return f"{cls.SECTION}.{name}" if cls.SECTION else name

    @classmethod
    def options(cls) -> Iterator[tuple[str, str, Declared]]:
        """Every option of this section and of those inside it: its whole name, its heading, and what it is."""
        heading = ""
        for name, info in cls.model_fields.items():
            heading = cls.HEADINGS.get(name, heading)
            inside = inner_section(info)
            if inside is not None:
                yield from inside.options()
            else:
                yield cls.dotted(name), heading, declared_by(info, name)


def inner_section(info: FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    hint = info.annotation
    return hint if isinstance(hint, type) and issubclass(hint, Section) else None


def declared_by(info: FieldInfo, name: str = "") -> Declared:
    """What a field says of its option, as methods say it of theirs."""
    words = {"ge": "minimum", "gt": "above", "le": "maximum", "lt": "below"}
    bounds = {ours: getattr(one, word) for one in info.metadata for word, ours in words.items() if hasattr(one, word)}
    default = dataclasses.MISSING if info.is_required() else info.get_default(call_default_factory=True)
    shown = next((one.shown for one in info.metadata if hasattr(one, "shown")), "")
    return Declared(name, info.annotation, default, Option(info.description or "", shown=shown, **bounds))


def unfit(declared: Declared, value: Any, *name: str) -> PydanticCustomError:
    """The error of a value that an option does not take."""
    close = difflib.get_close_matches(value, declared.choices, n=1) if isinstance(value, str) else []
    near = f'; did you mean "{close[0]}"?' if close else ""
    return mismatch(declared.words.replace("None", "null"), shown(value), near, *name)


def explained(error: ValidationError, section: str, places: Mapping[str, str]) -> LorakitError:
    """The first of pydantic's errors as lorakit's own, with the whole name of the option and its place.

    Args:
        error: what did not fit.
        section: what stands before the names in it.
        places: where each option was given: dotted name -> "file, line 3" or "--flag"; "" is the file.
    """
    first = error.errors(include_url=False)[0]
    parts = [*filter(None, [section]), *map(str, first["loc"]), *first.get("ctx", {}).get("name", ())]
    name, outer = ".".join(parts), ".".join([*parts[:1], *parts[-1:]])
    if name not in places and outer in places:  # method.rank, which went on to method.inner.rank
        name = outer
    text = f"{name}: {first['msg']}" if first["type"] == "mismatch" else first["msg"]
    while name and name not in places:  # then that of the mapping or section around it
        name = name.rpartition(".")[0]
    place = places.get(name, "")
    if PLACE in text:
        return LorakitError(text.replace(f" in {PLACE}", f" in {place}" if place else ""))
    return LorakitError(f"{text} ({place})" if place else text)


def readings(value: Any) -> Iterator[Any]:
    """What a value may stand for, the likeliest first: itself or what a flag's text may mean, then a list of that alone."""
    found = _text_readings(value) if isinstance(value, FlagText) else [value]
    if isinstance(value, Mapping) and any(isinstance(item, FlagText) for item in value.values()):
        found = [
            {key: read(str(item)) if isinstance(item, FlagText) else item for key, item in value.items()}
            for read in (parse_value, str)
        ]
    for one in found:
        yield tuple(one) if isinstance(one, list) else one
    yield from ((one,) for one in found if isinstance(one, str | int | float) and not isinstance(one, bool))


def _text_readings(text: str) -> list[Any]:
    """A flag's text as null, true or false, as a list, as YAML has it, and as text: `--name true` is a name."""
    words = {"none": None, "null": None, "true": True, "false": False}
    found: list[Any] = [words[text.lower()]] if text.lower() in words else []
    if _LIST.fullmatch(text):
        items = [item.strip() for item in text.split(",")]
        found += [[parse_value(item) for item in items], items]
    return [*found, parse_value(text), str(text)]


def shown(value: Any) -> str:
    """A value as an error shows it: as a file would have it."""
    value = parse_value(value) if isinstance(value, FlagText) else value
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int | float) else repr(value)
