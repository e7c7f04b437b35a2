"""Flags from a dataclass: a parameter of a verb whose type declares its fields by `option(...)` is a flag for each of them.

So a verb takes the same object that the library does, and its flags, their ranges and `--help` follow from the declarations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin

import typer

from lorakit.core.options import Declared, options_of
from lorakit.errors import LorakitError


def flags(**names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make each such parameter of a verb its options; `names` gives an option another flag than its own name. A default of the
    parameter gives the options' defaults."""

    def expand(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb, eval_str=True)
        groups = {one.name: one for one in signature.parameters.values() if dataclasses.is_dataclass(one.annotation)}
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name not in groups:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for one in options_of(parameter.annotation).values():
                default = one.default if parameter.default is parameter.empty else getattr(parameter.default, one.name)
                parameters.append(_parameter(one, default, names.get(one.name)))

        @functools.wraps(verb)
        def call(**given: Any) -> None:
            for name, parameter in groups.items():
                fields = options_of(parameter.annotation)
                read = {one: _read(given.pop(one), fields[one], names.get(one)) for one in fields}
                given[name] = parameter.annotation(**read)
            verb(**given)

        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return expand


def _parameter(declared: Declared, default: Any, flag: str | None) -> inspect.Parameter:
    """One option as typer wants it: numbers with commas are text, a mapping is a flag that may be repeated."""
    kind, option = _kind(declared.type), declared.option
    hint: Any = {tuple: str, dict: list[str]}.get(kind, kind)
    if kind in (tuple, dict) or default is None:
        hint, default = hint | None, None
    told = typer.Option(
        *([flag] if flag else []),
        help=f"{option.doc[:1].upper()}{option.doc[1:]}.",
        min=option.minimum,
        max=option.maximum,
    )
    return inspect.Parameter(
        declared.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, told]
    )


def _kind(hint: Any) -> Any:
    """The class of a value, None aside."""
    found = [one for one in get_args(hint) if one is not type(None)] if type(None) in get_args(hint) else [hint]
    origin = get_origin(found[0]) or found[0]
    return dict if origin is not tuple and isinstance(origin, type) and issubclass(origin, Mapping) else origin


def _read(value: Any, declared: Declared, flag: str | None) -> Any:
    """What was given for an option as the field has it."""
    flag, kind = flag or f"--{declared.name.replace('_', '-')}", _kind(declared.type)
    if kind is dict:
        pairs = [text.rpartition("=") for text in value or ()]
        for name, _, numbers in pairs:
            if not name:
                raise LorakitError(f"{flag} was given as {numbers!r}; expected NAME=NUMBERS, such as q_proj=1,0.")
        return {name: _numbers(numbers, flag) for name, _, numbers in pairs}
    return _numbers(value, flag) if kind is tuple and value is not None else value


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    """ "0.7,0.3" as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise LorakitError(
            f"{flag} was given as {text!r}; expected numbers with commas between, such as 0.7,0.3."
        ) from None
