"""All that can be attached or routed, by the names that files and command lines use: deltas, edits, mixtures, routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.core.delta import Spec
from lorakit.core.options import options_of
from lorakit.edits import EDITS
from lorakit.errors import LorakitError, unknown
from lorakit.experts import MIXTURES, ROUTERS
from lorakit.methods import METHODS, WHOLE

TABLE: dict[str, type[Spec]] = {**METHODS, **WHOLE, **EDITS, **MIXTURES, **ROUTERS}


def method_named(name: str) -> type[Spec]:
    """The spec class of this name, or an error with the nearest one."""
    if name not in TABLE:
        raise unknown("method", name, TABLE)
    return TABLE[name]


def spec_from_dict(options: Mapping[str, Any], where: str | None = None) -> Spec:
    """A spec from plain data, {"name": …, option: …}; the inverse of `Spec.to_dict`.

    Unknown options are refused with the nearest known one; a combinator's inner method is a mapping of the same kind.
    """
    if "name" not in options:
        raise LorakitError(f"a method is given by its name and options; {dict(options)!r} has no name.")
    method = method_named(options["name"])
    known = options_of(method)
    values = {}
    for key, value in options.items():
        if key == "name":
            continue
        if key not in known:
            raise unknown(f"option of {method.name}", key, known, where=where)
        values[key] = spec_from_dict(value, where) if isinstance(value, Mapping) and "name" in value else value
    return method(**values)
