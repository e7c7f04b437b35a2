"""How files of every method look, as data: one row for each that PEFT has too; the others are kept by lorakit's own rule.

Of adapter_config.json a row says what does not follow from the options' declarations (`core/options.py`); of the tensors, which
stand below their layers' names, what they are called: by lorakit's own rule METHOD_LETTER ("full_P").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorakit.core.combinator import Combinator
from lorakit.core.delta import Spec
from lorakit.core.options import options_of
from lorakit.errors import LorakitError, unknown
from lorakit.files.formats.edits import EDITS, ROUTERS
from lorakit.files.formats.format import Format as Format
from lorakit.files.formats.methods import METHODS
from lorakit.files.formats.methods import OTHER_AXES as OTHER_AXES
from lorakit.files.formats.methods import UNSUPPORTED as UNSUPPORTED
from lorakit.files.formats.methods import adalora_scale as adalora_scale
from lorakit.files.formats.methods import check_axes as check_axes
from lorakit.files.table import TABLE

FORMATS: dict[str, Format] = {**METHODS, **EDITS, **ROUTERS}
"""Method -> its files. Of rows with one PEFT name the first that claims a configuration reads it."""

_OWN = Format()


def format_of(name: str) -> Format:
    """How the files of the method of this name look."""
    return FORMATS.get(name, _OWN)


# -- the configuration ---------------------------------------------------------------------------------------------------------


def entries_of(spec: Spec) -> dict[str, Any]:
    """The entries of adapter_config.json that say what the method is, `peft_type` among them."""
    row = format_of(spec.name)
    entries = entries_of(spec.inner) if isinstance(spec, Combinator) else {}
    entries["peft_type"] = row.peft or spec.name.upper()
    for declared in options_of(type(spec)).values():
        if declared.option.peft is not None:
            value = getattr(spec, declared.name)
            written = declared.option.to_peft
            entries[declared.option.peft] = value if written is None else written(value)
    return {**entries, **row.fixed, **row.write(spec)}


def spec_from_peft(config: Mapping[str, Any]) -> Spec:
    """The spec that PEFT's configuration describes; entries that cannot be honoured are refused by name."""
    given = config.get("peft_type")
    kind = str(getattr(given, "value", given))  # PEFT's own configuration has an enumeration there
    if kind in UNSUPPORTED:
        raise LorakitError(f"PEFT type {kind} is not supported because {UNSUPPORTED[kind]}.")
    rows = {name: row for name, row in FORMATS.items() if row.peft is not None}
    name = next((name for name, row in rows.items() if kind in (row.peft, *row.also) and row.claims(config)), None)
    if name is None:
        raise unknown("PEFT type", kind, dict.fromkeys(str(row.peft) for row in rows.values()))
    if name == "dora":
        return TABLE[name](inner=spec_from_peft({**config, "use_dora": False}))  # type: ignore[call-arg]
    return _read(name, config)


def with_integers(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration with integers where its options are such: hands and other tools write a rank as 8.0."""
    counts = {
        entry
        for name, row in FORMATS.items()
        if row.peft == config.get("peft_type")
        for declared in options_of(TABLE[name]).values()
        if declared.type in (int, int | None)
        for entry in (declared.option.peft, declared.option.pattern)
    }

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: whole(one) for key, one in value.items()}
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return {key: whole(value) if key in counts else value for key, value in config.items()}


def _read(name: str, config: Mapping[str, Any]) -> Spec:
    row, method = format_of(name), TABLE[name]
    for entry, why in row.refused.items():
        if config.get(entry):
            raise LorakitError(f"load: the configuration sets {entry}={config[entry]!r}: {why}.")
    changed = row.read(config)
    values: dict[str, Any] = {}
    for declared in options_of(method).values():
        option = declared.option
        if option.peft is not None and declared.name not in changed:
            value = config.get(option.peft, option.peft_default)
            if value is not ...:
                values[declared.name] = value if option.from_peft is None else option.from_peft(value)
    return method(**values, **changed)


def known_entries(spec: Spec) -> set[str]:
    """Names of the entries of PEFT's configuration that are understood for this method."""
    row, patterns = format_of(spec.name), getattr(spec, "pattern_fields", {})
    return {*entries_of(spec), *row.ignored, *patterns.values(), "fan_in_fan_out", "init_weights", "runtime_config"}


# -- names of tensors ----------------------------------------------------------------------------------------------------------


def word_of(name: str) -> str:
    """What names of tensors begin with by lorakit's own rule."""
    return name.replace("-", "")


def ending_of(spec: Spec) -> str:
    """A regular expression for what follows a layer's path in the names of its tensors."""
    row = format_of(spec.name)
    tables = [row.tensors, *row.kinds.values()]
    names = {described.partition(":")[0] for table in tables for described in table.values()}
    own = "|".join(map(re.escape, sorted(names))) or rf"{word_of(spec.name)}_\w+"
    return rf"(?:experts\.\d+\.)?(?:{ending_of(spec.inner)}|{own})" if isinstance(spec, Combinator) else own
