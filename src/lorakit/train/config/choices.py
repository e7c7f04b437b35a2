"""Options that name one thing of a table and hold its options: the method, how it starts, how the base is quantised.

`method: {name: lora, rank: 8}` and `rank: 8` beside `method: lora` make the same spec, `LoRA(rank=8)`, which is what the
configuration then holds. The options are those that the spec's class declares, so that a new row of a table is known to files
and flags without a change here. A spec that holds another one (a magnitude over a LoRA) is a mapping in a mapping; an option
written one level too far out goes to the outermost spec that has it, so `rank: 8` reaches the inner LoRA too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from lorakit.core.options import Declared, options_of
from lorakit.errors import LorakitError, unknown
from lorakit.train.config.section import PLACE, mismatch, readings, rule, shown, unfit


def methods() -> Mapping[str, type]:
    """The method table: name -> spec class."""
    from lorakit.files.table import TABLE

    return TABLE


def initialisers() -> Mapping[str, type]:
    """The table of initialisers: name -> class."""
    from lorakit.init import INITIALISERS

    return INITIALISERS


def quantisations() -> Mapping[str, type]:
    """The table of formats that a base can be quantised to: name -> class."""
    from lorakit.models.quantisation import FORMATS

    return FORMATS


@dataclass(frozen=True)
class Choice:
    """The annotation of a field that holds a spec of a table.

    Attributes:
        kind: what is chosen, for messages: "method".
        table: the specs that exist, by name; asked when a value is read, since importing them imports torch.
        shown: how the type is named to people.
        optional: whether it may be null.
        default: the name that a mapping without one has; empty where it must have one.
    """

    kind: str
    table: Callable[[], Mapping[str, type]]
    shown: str = "a method"
    optional: bool = False
    default: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(self.write)
        return core_schema.no_info_plain_validator_function(self.read, serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {}  # `schema.py` fills in the alternatives

    # -- what there is ------------------------------------------------------------------------------------------------
    def name_of(self, spec: Any) -> str:
        """The name of a spec in the table; the table's first where it has none."""
        table = self.table()
        return next((name for name, cls in table.items() if type(spec) is cls), next(iter(table)))

    def inner(self, spec: type) -> dict[str, Choice]:
        """The options of a spec that hold another one, each with the choice that it is."""
        found = {}
        for name, declared in options_of(spec).items():
            hint = declared.type if isinstance(declared.type, type) else ()
            table = {key: cls for key, cls in self.table().items() if issubclass(cls, hint)}
            if table:
                found[name] = Choice(self.kind, table.copy, "a method")
        return found

    def reachable(self, spec: type, options: Mapping[str, Any] | None = None) -> dict[str, Declared]:
        """Every option that can be written for a spec: its own, then those of the specs that it holds.

        `options` may already name the specs that this one holds; else they are the default ones.
        """
        names = dict(options_of(spec))
        for name, choice in self.inner(spec).items():
            inner = choice.class_of((options or {}).get(name), names[name].default)
            names |= {key: declared for key, declared in choice.reachable(inner).items() if key not in names}
        return names

    def named(self, value: Any) -> Any:
        """The name in what is written; None in a mapping without one, where there is no default."""
        return value.get("name", self.default or None) if isinstance(value, Mapping) else value

    def class_of(self, written: Any, default: Any) -> type:
        """The class of a spec that is written as a name, a mapping or itself; else that of the default, else the first."""
        name = written.get("name") if isinstance(written, Mapping) else written
        table = self.table()
        classes = [table.get(name) if isinstance(name, str) else type(written), type(default)]
        return next((cls for cls in classes if cls in table.values()), None) or next(iter(table.values()))

    def patterns(self, spec: Any) -> dict[str, Declared]:
        """The options of a spec and of those it holds that may differ per layer."""
        held = {key: getattr(spec, key) for key in self.inner(type(spec))}
        return {name: one for name, one in self.reachable(type(spec), held).items() if one.option.pattern}

    # -- plain values to specs and back -------------------------------------------------------------------------------
    def read(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """A spec from a name, a mapping with `name` and options, or a spec already made.

        Args:
            value: what was written.
            path: where this choice is inside the outermost one: ("inner",).

        Raises:
            PydanticCustomError: no such name, or no such option of it, or a value that does not fit.
        """
        table = self.table()
        if type(value) in table.values():
            return value
        name = self.named(value)
        if self.optional and (name is None or name in ("none", "null")):
            return None
        if not isinstance(name, str):
            expected = f"the name of a known {self.kind}, or a mapping with `name` and its options"
            found = "a mapping without `name`" if isinstance(value, Mapping) and "name" not in value else shown(name)
            raise mismatch(expected, found, f". Known: {', '.join(table)}", *path)
        if name not in table:
            raise rule(str(unknown(self.kind, name, table, PLACE)), *path, "name")
        options = {key: item for key, item in value.items() if key != "name"} if name is not value else {}
        spec = table[name]
        self._refuse_others(str(name), options, path)
        own, inner, values = options_of(spec), self.inner(spec), self._passed_on(spec, options, path)
        for key, item in values.items():
            at = (*path, key)
            values[key] = inner[key].read(item, at) if key in inner else read_declared(own[key], item, *at)
        if missing := [key for key, one in own.items() if one.default is dataclasses.MISSING and key not in values]:
            raise rule(f"{name} needs {', '.join(missing)}", *path)
        try:
            return spec(**values)
        except LorakitError as error:
            blamed = [key for key in options if re.search(rf"\b{re.escape(key)}\b", str(error))]
            raise rule(str(error), *path, *blamed[:1]) from None

    def write(self, spec: Any) -> Any:
        """The plain form of a spec, all its options written out; the name alone where there are none."""
        if spec is None:
            return None
        plain: dict[str, Any] = {"name": self.name_of(spec)}
        inner = self.inner(type(spec))
        for key in options_of(type(spec)):
            value = getattr(spec, key)
            plain[key] = inner[key].write(value) if key in inner else list(value) if isinstance(value, tuple) else value
        return plain if len(plain) > 1 else plain["name"]

    def _refuse_others(self, name: str, options: Mapping[str, Any], path: tuple[str, ...]) -> None:
        """Raises for an option that the spec of this name does not have."""
        table = self.table()
        known = self.reachable(table[name], options)
        for key in [key for key in options if key not in known]:
            owners = [other for other, cls in table.items() if key in self.reachable(cls)]
            refusal = str(unknown(f"option of {name}", key, known, PLACE))
            if owners:
                listed = ", ".join(known) or "none"
                refusal = f"{name} has no {key}; {key} belongs to {', '.join(owners)}. Options of {name}: {listed}."
            raise rule(refusal, *path, key)

    def _passed_on(self, spec: type, options: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        """The options, with those of an inner spec moved into it."""
        own, values = options_of(spec), dict(options)
        for key, choice in self.inner(spec).items():
            known = choice.reachable(choice.class_of(options.get(key), own[key].default))
            passed = {name: values.pop(name) for name in options if name not in own and name in known}
            written = values.get(key, choice.name_of(own[key].default))
            written = choice.write(written) if type(written) in choice.table().values() else written
            written = {"name": written} if isinstance(written, str) else written
            if passed and isinstance(written, Mapping):
                if twice := sorted(set(written) & set(passed)):
                    raise rule(f"{twice[0]} is given twice, once inside {key}; keep one", *path, twice[0])
                values[key] = {**written, **passed}
        return values


def read_declared(declared: Declared, value: Any, *path: str) -> Any:
    """A value as its option takes it; `path` is the name to blame."""
    for reading in readings(value):
        if declared.takes(reading):
            return float(reading) if declared.type is float else reading
    raise unfit(declared, value, *path)


def read_pattern(declared: Declared, values: Any) -> dict[str, Any]:
    """The values of one option by layer, each read as the option is."""
    path = ("patterns", declared.name)
    if not isinstance(values, Mapping):
        raise mismatch("a mapping from names of layers to values", shown(values), "", *path)
    return {layer: read_declared(declared, value, *path, layer) for layer, value in values.items()}


METHOD = Choice("method", methods, default="lora")
INIT = Choice("init", initialisers, "an initialiser")
QUANTISATION = Choice("quantisation", quantisations, "a format or null", optional=True)
CHOICES = {"method": METHOD, "init": INIT, "quantize": QUANTISATION}
"""The options of a run that are choices, by name."""
