"""The JSON schema of a run's file, for editors and for checks without Python (`lorakit train --schema`).

Methods, starts and formats are alternatives, each with its own options. A method's options may also stand beside
`method: NAME`; those that it does not have are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from lorakit.core.options import Declared, options_of
from lorakit.train.config.choices import CHOICES, METHOD, Choice
from lorakit.train.config.flags import Names
from lorakit.train.config.options import TrainConfig

BOUNDS = {"minimum": "minimum", "exclusiveMinimum": "above", "maximum": "maximum", "exclusiveMaximum": "below"}
"""What JSON Schema calls the bounds of a number, to what `Option` calls them."""


class _Generator(GenerateJsonSchema):
    """Pydantic's schema of what a file may hold: without titles, and with one value where a list of them is asked."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def tuple_schema(self, schema: core_schema.TupleSchema) -> JsonSchemaValue:
        listed = super().tuple_schema(schema)
        return {"anyOf": [listed["items"], listed]} if "items" in listed else listed


def json_schema() -> dict[str, Any]:
    """The schema of the files that `load_config` reads."""
    names = Names()
    schema = TrainConfig.model_json_schema(schema_generator=_Generator)
    properties, definitions = schema["properties"], schema["$defs"]
    for name, choice in CHOICES.items():
        definitions |= _definitions(name, choice)
        properties[name] |= _alternatives(name, choice)
    for name, owners in names.of_methods.items():
        properties[name] = {"description": owners[0][1].option.doc}
    for pattern, name in names.patterns.items():
        properties[pattern] = {"description": f"other values of {name} for some layers: {{q_proj: ...}}"}
    for section in definitions.values():
        for kind in section["properties"].values():
            if "ge" in kind:  # pydantic leaves the bound of a count or a share so
                kind["minimum"] = kind.pop("ge")
    own = [*TrainConfig.model_fields]
    schema["allOf"] = [_beside(method, definitions[f"method.{method}"]["properties"], own) for method in METHOD.table()]
    return {"$schema": _Generator.schema_dialect, **schema, "title": "A training run of lorakit"}


def _definitions(name: str, choice: Choice) -> dict[str, Any]:
    """The alternatives of a choice by name: mappings with the name and its options."""
    table = choice.table()
    own = {key: {option: _kind(one) for option, one in options_of(spec).items()} for key, spec in table.items()}
    found = {}
    for key, spec in table.items():
        options = {"name": {"const": key}, **own[key]}
        for field, inner in choice.inner(spec).items():
            options[field] = {"description": options_of(spec)[field].option.doc, **_alternatives(name, inner)}
            for held in inner.table():  # an option of an inner method may stand one level out, whichever method it is
                options = {**own[held], **options}
        required = [] if key == choice.default else ["name"]
        shape = {"type": "object", "properties": options, "required": required, "additionalProperties": False}
        found[f"{name}.{key}"] = shape
    return found


def _kind(declared: Declared) -> dict[str, Any]:
    """One option of a spec; that of another spec is filled in by its alternatives."""
    option, default = declared.option, declared.default
    if not isinstance(declared.type, type) or declared.type.__module__ == "builtins":
        kind = TypeAdapter(declared.type).json_schema(schema_generator=_Generator)
    else:
        kind, default = {}, dataclasses.MISSING
    for part in [kind, *kind.get("anyOf", ())]:
        if part.get("type") in ("integer", "number"):
            part |= {word: bound for word, ours in BOUNDS.items() if (bound := getattr(option, ours)) is not None}
    if default is not dataclasses.MISSING:
        kind["default"] = list(default) if isinstance(default, tuple) else default
    return {"description": option.doc, **kind}


def _alternatives(name: str, choice: Choice) -> dict[str, Any]:
    """A name, or a mapping of `_definitions`."""
    table = choice.table()
    null: list[dict[str, Any]] = [{"type": "null"}, {"const": "none"}] if choice.optional else []
    return {"anyOf": [{"enum": list(table)}, *null, *({"$ref": f"#/$defs/{name}.{key}"} for key in table)]}


def _beside(method: str, options: Iterable[str], own: list[str]) -> dict[str, Any]:
    """What may stand beside `method: NAME`; where no method is named it is lora."""
    is_default = method == METHOD.default
    mapping = {"properties": {"name": {"const": method}}, "required": [] if is_default else ["name"], "type": "object"}
    chosen = {
        "properties": {"method": {"anyOf": [{"const": method}, mapping]}},
        "required": [] if is_default else ["method"],
    }
    kinds = f"#/$defs/method.{method}/properties"
    short: dict[str, Any] = {name: {"$ref": f"{kinds}/{name}"} for name in options if name not in ("name", *own)}
    declared = METHOD.reachable(METHOD.table()[method])
    for name in [name for name in short if name in declared and declared[name].option.pattern]:
        short[f"{name}_pattern"] = {"type": "object", "additionalProperties": short[name]}
    return {"if": chosen, "then": {"properties": short, "propertyNames": {"enum": [*own, *short]}}}
