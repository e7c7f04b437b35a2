"""Options that name one thing of a table: the method, with its own options, and how it starts.

`method: lora`, `method: {name: lora, rank: 8}` and `rank: 8` beside `method: lora` all make the same spec,
`LoRA(rank=8)`, which is what the configuration then holds. The options of a method are the fields of its spec
class, read here by their types, so that a new row in a table of `lorakit.experts.SPECS` is known to files and flags
without a change here. A spec that holds another one (a magnitude over a LoRA) is a mapping in a mapping; an
option written one level too far out goes to the outermost spec that has it, so `rank: 8` reaches the inner
LoRA too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lorakit.core.options import docs
from lorakit.errors import LorakitError, unknown
from lorakit.train.config.document import parse_value
from lorakit.train.config.schema import NOWHERE, FlagText, Origins, default_of, hints_of, read


def methods() -> dict[str, type]:
    """The method table: name -> spec class."""
    from lorakit.files.table import TABLE

    return dict(TABLE)


def initialisers() -> dict[str, type]:
    """The table of initialisers: name -> class."""
    from lorakit.init import INITIALISERS

    return dict(INITIALISERS)


def quantisations() -> dict[str, type]:
    """The table of formats that a base can be held in: name -> class."""
    from lorakit.models.quantisation import FORMATS

    return dict(FORMATS)


def option_names(spec: type, table: Mapping[str, type], options: Mapping[str, Any] | None = None) -> dict[str, type]:
    """Every option that can be written for a spec: name -> the class that has it, the outermost one.

    `options` may already name the specs that this one holds; else they are the default ones.
    """
    names: dict[str, type] = {}
    for field in dataclasses.fields(spec):
        names.setdefault(field.name, spec)
    for inner in inner_classes(spec, table, options).values():
        for name, owner in option_names(inner, table).items():
            names.setdefault(name, owner)
    return names


def option_docs(spec: type) -> dict[str, str]:
    """The one-line doc of each option, from its declaration."""
    return docs(spec)


def read_choice(value: Any, table: Mapping[str, type], kind: str, name: str, origins: Origins = NOWHERE) -> Any:
    """A spec from a name, a mapping with `name` and options, or a spec already made.

    Args:
        value: what was written.
        table: the specs that exist.
        kind: what is being chosen, for messages: "method".
        name: the dotted name of the option.
        origins: where it was written.

    Raises:
        LorakitError: no such name, or no such option of it, or a value out of range.
    """
    if isinstance(value, tuple(table.values())):
        return value
    value = _opened(value)
    if isinstance(value, str):
        value = {"name": str(value)}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        found = value if not isinstance(value, Mapping) else "a mapping without `name`"
        raise LorakitError(
            f"{name}: expected the name of a known {kind}, or a mapping with `name` and its options, found {found}"
            f"{origins.suffix(name)}. Known: {', '.join(table)}."
        )
    chosen = str(value["name"])
    if chosen not in table:
        raise unknown(kind, chosen, table, where=origins.of(f"{name}.name") or None)
    options = {key: item for key, item in value.items() if key != "name"}
    return _make(table[chosen], chosen, options, table, kind, name, origins)


def _opened(value: Any) -> Any:
    """A mapping that was written as a flag's text; anything else as it is."""
    return parse_value(value) if isinstance(value, FlagText) and value.lstrip().startswith("{") else value


def _make(
    spec: type,
    chosen: str,
    options: Mapping[str, Any],
    table: Mapping[str, type],
    kind: str,
    name: str,
    origins: Origins,
) -> Any:
    options = {key: _opened(item) for key, item in options.items()}
    inner = inner_classes(spec, table, options)
    own = {field.name: field for field in dataclasses.fields(spec)}
    reachable = option_names(spec, table, options)
    for key in options:
        if key not in reachable:
            place = origins.of(f"{name}.{key}")
            elsewhere = [other for other, cls in table.items() if key in option_names(cls, table)]
            if elsewhere:
                raise LorakitError(
                    f'"{key}" is no option of {chosen}{f" ({place})" if place else ""}; it is one of '
                    f"{', '.join(elsewhere)}. Options of {chosen}: {', '.join(reachable)}."
                )
            raise unknown(f"option of {chosen}", key, reachable, where=place or None)
    values: dict[str, Any] = {}
    passed_on = {key: item for key, item in options.items() if key not in own}
    hints = hints_of(spec)
    for key, field in own.items():
        dotted = f"{name}.{key}"
        if key not in inner:
            if key in options:
                values[key] = read(options[key], hints[key], dotted, origins)
            continue
        wanted = {n: item for n, item in passed_on.items() if n in option_names(inner[key], table)}
        if key in options or wanted:
            written = options.get(key, _name_of(default_of(field), table))
            if isinstance(written, str):
                written = {"name": str(written)}
            if isinstance(written, Mapping) and (twice := sorted(set(written) & set(wanted))):
                raise LorakitError(
                    f"{dotted}.{twice[0]} is also given as {name}.{twice[0]}; keep one{origins.suffix(name)}"
                )
            inner_table = {n: cls for n, cls in table.items() if issubclass(cls, _bound(hints[key]))}
            merged = {**written, **wanted} if isinstance(written, Mapping) else written
            values[key] = read_choice(merged, inner_table, kind, dotted, origins)
    try:
        return spec(**values)
    except TypeError:
        needed = [key for key, field in own.items() if key not in values and default_of(field) is dataclasses.MISSING]
        if not needed:
            raise
        raise LorakitError(f"{chosen} needs {', '.join(needed)}{origins.suffix(name)}") from None
    except LorakitError as error:
        blamed = next((key for key in options if re.search(rf"\b{re.escape(key)}\b", str(error))), "")
        raise LorakitError(f"{error}{origins.suffix(f'{name}.{blamed}' if blamed else name)}") from None


def _bound(hint: Any) -> type:
    return hint if isinstance(hint, type) else object


def inner_classes(spec: type, table: Mapping[str, type], options: Mapping[str, Any] | None = None) -> dict[str, type]:
    """The fields of a spec that hold another spec: field -> its class, as `options` name it or as the default is."""
    found: dict[str, type] = {}
    hints = hints_of(spec)
    for field in dataclasses.fields(spec):
        hint = hints[field.name]
        if not isinstance(hint, type) or not any(issubclass(cls, hint) for cls in table.values()):
            continue
        written = (options or {}).get(field.name)
        name = written.get("name") if isinstance(written, Mapping) else written
        default = default_of(field)
        if isinstance(name, str) and name in table:
            found[field.name] = table[name]
        elif isinstance(default, hint):
            found[field.name] = type(default)
        else:
            found[field.name] = next(c for c in table.values() if issubclass(c, hint) and c is not spec)
    return found


def _name_of(spec: Any, table: Mapping[str, type]) -> str:
    return next((name for name, cls in table.items() if type(spec) is cls), next(iter(table)))


def write_choice(spec: Any, table: Mapping[str, type]) -> Any:
    """The plain form of a spec, all its options written out; the name alone where there are none."""
    plain: dict[str, Any] = {"name": _name_of(spec, table)}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if type(value) in table.values():
            value = write_choice(value, table)
        plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain if len(plain) > 1 else plain["name"]


def read_method(value: Any, name: str, origins: Origins) -> Any:
    """The spec of the `method` option."""
    return read_choice(value, methods(), "method", name, origins)


def write_method(value: Any) -> Any:
    """The plain form of the `method` option."""
    return write_choice(value, methods())


def read_init(value: Any, name: str, origins: Origins) -> Any:
    """The initialiser of the `init` option."""
    return read_choice(value, initialisers(), "init", name, origins)


def write_init(value: Any) -> Any:
    """The plain form of the `init` option."""
    return write_choice(value, initialisers())


def read_quantize(value: Any, name: str, origins: Origins) -> Any:
    """The format of the `quantize` option; None where the base stays as it is."""
    chosen = value.get("name") if isinstance(value, Mapping) and set(value) == {"name"} else value
    if chosen is None or (isinstance(chosen, str) and chosen in ("none", "null")):
        return None
    return read_choice(value, quantisations(), "quantisation", name, origins)


def write_quantize(value: Any) -> Any:
    """The plain form of the `quantize` option."""
    return None if value is None else write_choice(value, quantisations())
