"""Where rows come from: one source, or a list of sources, each with options of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from lorakit.errors import LorakitError
from lorakit.train.config.section import FlagText, Section, mismatch, readings, rule, shown

Format = Literal["auto", "prompt-completion", "messages", "text", "tokens", "classification"]


class Source(Section, frozen=True):
    """One source of rows; what it does not say is said by the data section."""

    SECTION: ClassVar[str] = "data.train"

    path: str = Field(description="a file, a pattern, a folder or a `datasets` name")
    format: Format | None = Field(default=None, description="as data.format")
    columns: dict[str, str] | None = Field(default=None, description="as data.columns")
    template: str | None = Field(default=None, description="as data.template")
    template_arguments: dict[str, Any] | None = Field(default=None, description="as data.template_arguments")
    system: str | None = Field(default=None, description="as data.system")
    split: str | None = Field(default=None, description="as data.split")
    subset: str | None = Field(default=None, description="as data.subset")
    weight: float | None = Field(
        default=None, gt=0, description="the probability of the source where sources are interleaved"
    )

    @property
    def own(self) -> dict[str, Any]:
        """The options of the data section that it gives another value."""
        names = ("format", "columns", "template", "template_arguments", "system", "split", "subset")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Sources:
    """The annotation of an option that takes a source, or a list of sources."""

    shown: ClassVar[str] = "text, a mapping with `path`, or a list of these"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(write)
        return core_schema.no_info_plain_validator_function(read, serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        one = {"anyOf": [{"type": "string"}, TypeAdapter(Source).json_schema()]}
        return {"anyOf": [{"type": "null"}, *one["anyOf"], {"type": "array", "items": one}]}


SOURCES = Sources()


def read(value: Any) -> Any:
    """A name, or names and sources, from what was written.

    Raises:
        PydanticCustomError: it is something else, or a source has an option that it cannot have.
    """
    expected = "a file, folder or dataset by name, a mapping with `path`, or a list of these"
    for reading in readings(value):
        if reading is None or (isinstance(reading, str) and not isinstance(value, FlagText)):
            return reading
        if isinstance(reading, str):
            return str(reading)
        if isinstance(reading, Mapping | Source):
            return (_source(reading),)
        if isinstance(reading, Sequence) and all(isinstance(one, str | Mapping | Source) for one in reading):
            return tuple(str(one) if isinstance(one, str) else _source(one) for one in reading)
    raise mismatch(expected, shown(value))


def _source(value: Any) -> Source:
    if isinstance(value, Source):
        return value
    if "path" not in value:
        raise rule(f"data.train: a source needs `path`, and this one has {', '.join(map(str, value)) or 'nothing'}")
    try:
        return Source(**value)
    except LorakitError as error:
        raise rule(str(error)) from None


def write(value: Any) -> Any:
    """The plain form: of a source what it says."""
    if isinstance(value, tuple):
        return [write(one) for one in value]
    return value.model_dump(mode="json", exclude_none=True) if isinstance(value, Source) else value


def as_sources(value: Any) -> tuple[Source, ...]:
    """What was written, as a list of sources: one name is the list of one."""
    listed = () if value is None else value if isinstance(value, tuple) else (value,)
    return tuple(one if isinstance(one, Source) else Source(path=one) for one in listed)
