"""Which option a name in a file or a flag means, and the values of both in one tree.

`--train.max-steps 20`, `--train.max_steps=20`, `--set train.max_steps=20` and `train.max_steps=20` are one thing. The text
stays text until the option's type reads it, so `--model 123` is a name and `--rank 1.5` an error. `rank: 8` at the top of a
file and `--rank 8` are spellings of `method.rank`, and `rank_pattern` is one of `patterns.rank`.
"""

from __future__ import annotations

import difflib
import logging
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from lorakit.core.options import Declared
from lorakit.errors import LorakitError, nearest, plural
from lorakit.train.config.choices import CHOICES, METHOD
from lorakit.train.config.document import parse_value
from lorakit.train.config.foreign import RENAMED
from lorakit.train.config.options import TrainConfig
from lorakit.train.config.section import FlagText

log = logging.getLogger("lorakit")


SHORT = {"from": "continue_from"}
"""Options by a name that Python keeps for itself."""


class Names:
    """The names of all options. Those of methods are asked for only where no other has the name: that imports torch."""

    def __init__(self) -> None:
        self.own = {name: declared for name, _, declared in TrainConfig.options()}
        self.sections = {name.partition(".")[0] for name in self.own if "." in name}

    @cached_property
    def of_methods(self) -> dict[str, list[tuple[str, Declared]]]:
        """The options of methods by their short names (`rank`, not `method.rank`), each with the methods that have it."""
        found: dict[str, list[tuple[str, Declared]]] = {}
        for method, spec in METHOD.table().items():
            for name, declared in METHOD.reachable(spec).items():
                if name not in self.own:
                    found.setdefault(name, []).append((method, declared))
        return found

    @cached_property
    def patterns(self) -> dict[str, str]:
        """The names by which options differ per layer, each with its option: "rank_pattern"."""
        options = self.of_methods.items()
        return {f"{name}_pattern": name for name, owners in options if any(one.option.pattern for _, one in owners)}

    def path(self, asked: str, where: str, spelled: str = "") -> tuple[str, ...]:
        """The option that a name means, as keys into the tree of values.

        Args:
            asked: the name as it was written, with - or _.
            where: the place, for the error.
            spelled: the flag, if it is one: it must name an option and not a section.

        Raises:
            LorakitError: no option is called so.
        """
        name = SHORT.get(asked, asked.replace("-", "_"))
        if name in self.own:
            return tuple(name.split("."))
        for option in self.own:
            rest = asked[len(option) + 1 :]  # of a mapping's key, which may hold dots and dashes
            if name.startswith(option + "."):
                if option in CHOICES:
                    return tuple(name.split("."))
                if typing.get_origin(self.own[option].type) is dict:
                    return (*option.split("."), *rest.split(".", 1 if option == "patterns" else 0))
        if name in self.sections:
            inside = ", ".join(option for option in self.own if option.startswith(name + "."))
            raise LorakitError(f"{spelled}: {name} is a section; set one of its options: {inside}")
        head, _, layer = asked.partition(".")
        if head not in self.sections:
            if name in self.of_methods:
                return ("method", name)
            if option := self.patterns.get(head.replace("-", "_"), ""):
                return ("patterns", option, *filter(None, [layer]))
        raise self.refusal(name, where)

    def refusal(self, asked: str, where: str) -> LorakitError:
        """The error for an option that does not exist, with the nearest that does and those of the same section."""
        known = [*self.own, *self.of_methods, *self.patterns]
        section, _, leaf = asked.rpartition(".")
        called = [RENAMED[leaf]] if leaf in RENAMED and RENAMED[leaf] != asked else []
        called += [name for name in known if name.rpartition(".")[2] == leaf]
        near = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
        hint = f'; lorakit calls it "{called[0]}".' if called else f'; did you mean "{near[0]}"?' if near else "."
        siblings = [name for name in self.own if name.rpartition(".")[0] == section]
        listed = siblings if section and siblings else [*TrainConfig.model_fields, "and the options of the method"]
        place = f" in {where}" if where else ""
        return LorakitError(f'unknown option "{asked}"{place}{hint} Known: {", ".join(listed)}.')

    def knows(self, name: str) -> bool:
        """Whether an option of a method, or a mapping of one by layers, has this name."""
        return name in self.of_methods or name in self.patterns

    def refusals(self, asked: Sequence[str], places: Mapping[str, str]) -> LorakitError:
        """The error for several options that do not exist: a file of another tool, most likely."""
        said = []
        for name in asked:
            called = [RENAMED[name]] if name in RENAMED else []
            near = nearest(name, [*self.own, *self.of_methods], cutoff=0.7)
            hint = f" (here {called[0]})" if called else f" (did you mean {near[0]}?)" if near else ""
            said.append(f"{name}{hint}")
        file = places[""]
        return LorakitError(
            f"{file}: {plural(len(said), 'unknown option')}: {', '.join(said)}. A file of Axolotl or LLaMA-Factory is read by "
            f"lorakit init --from {file}; lorakit train --help lists the options."
        )

    def switch(self, flag: str) -> tuple[str, str] | None:
        """The option and text of a bare flag: `--x` is true and `--no-x` false, for options that are true or false."""
        name = flag.replace("-", "_")
        for plain, text in ((name, "true"), (name.removeprefix("no_"), "false")):
            is_own = plain in self.own or "." in plain
            declared = [self.own.get(plain)] if is_own else [one for _, one in self.of_methods.get(plain, ())]
            if any(one and one.type is bool for one in declared) and (text == "true" or plain != name):
                return plain, text
        return None


def merged(
    tree: Mapping[str, Any], places: Mapping[str, str], tokens: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file and of flags in one tree, and where each was given.

    Where a flag names another method than the file, options of the file's method that the other one does not have are left
    out, with a line in the log; what the flags themselves give must fit.

    Raises:
        LorakitError: a name that no option has, an option given twice, a flag without a value, a word that is no flag.
    """
    names, where = Names(), dict(places)
    values = _lifted(names, tree, where)
    before = {name: dict(values[name]) for name in CHOICES if isinstance(values.get(name), dict)}
    flags: set[tuple[str, ...]] = set()
    said: dict[tuple[str, ...], str] = {}
    for asked, text, spelled in _split(names, tokens):
        path = names.path(asked, f"the flags ({spelled})", spelled)
        flags.add(path[:2])
        if path in said:
            kind = names.own[".".join(path)].type if ".".join(path) in names.own else int
            takes_list = kind is Any or "tuple" in str(kind)
            listed = f", or give a list: {spelled} '[a, b]'" if takes_list else ""
            twice = "twice" if said[path] == spelled else f"twice, first as {said[path]}"
            raise LorakitError(f"{spelled} is given {twice}; keep one{listed}")
        said[path] = spelled
        where[".".join(path)] = spelled
        is_mapping = text.lstrip().startswith("{") and path[0] in (*CHOICES, "patterns")
        if len(path) == 1 and path[0] in CHOICES and not is_mapping:
            path = (*path, "name")  # the name alone changes: options of the file stay where the new method has them
            where[".".join(path)] = spelled
        target = values
        for part in path[:-1]:
            inner = target.get(part)
            if not isinstance(inner, dict):
                inner = {"name": inner} if inner is not None and path[0] in CHOICES else {}
                target[part] = inner
            target = inner
        target[path[-1]] = parse_value(text) if is_mapping else FlagText(text)
    for name, options in before.items():
        if isinstance(values[name], dict):
            kept = {key for key in options if (name, key) not in flags}
            _leave_out(name, kept, str(CHOICES[name].named(options)), values[name], where)
    return values, where


def _lifted(names: Names, tree: Mapping[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """A file's values with `rank: 8` moved to `method: {rank: 8}`, its owner, and choices as mappings; names are checked."""
    values: dict[str, Any] = {}
    places |= {long: places[short] for short, long in SHORT.items() if short in places}
    for key, value in tree.items():
        key = SHORT.get(key, key)
        if key in CHOICES and not isinstance(value, Mapping):
            values[key] = {"name": value}
        elif key in TrainConfig.model_fields:
            values[key] = dict(value) if isinstance(value, Mapping) else value
        for inner in value if key in names.sections and isinstance(value, Mapping) else ():
            if f"{key}.{inner}" not in names.own:
                raise names.refusal(f"{key}.{inner}", places[f"{key}.{inner}"])
    unread = [key for key in tree if SHORT.get(key, key) not in values]
    strange = [key for key in unread if key.isidentifier() and not names.knows(key)]
    if len(strange) > 1:
        raise names.refusals(strange, places)
    for key in unread:
        section, dot, leaf = key.partition(".")
        if dot and key in names.own:
            raise LorakitError(
                f'"{key}" in {places[key]}: in a file it stands in its section, {section}: {{{leaf}: ...}}'
            )
        if not key.isidentifier():
            raise names.refusal(key, places[key])
        owner, option = names.path(key, places[key])
        target = values.setdefault(owner, {})
        if option in target:
            twice = f"{places[key]} and {places.get(f'{owner}.{option}')} (as {owner}.{option})"
            raise LorakitError(f"{key} is given twice: {twice}; keep one")
        target[option] = tree[key]
        places[f"{owner}.{option}"] = places[key]
    return values


def _leave_out(name: str, kept: set[str], own: str, options: dict[str, Any], places: Mapping[str, str]) -> None:
    """Takes out of `options` what a file gave for its choice `own` (`kept`) and the one that a flag names does not have."""
    choice = CHOICES[name]
    table, other = choice.table(), str(choice.named(options))
    none = choice.optional and other in ("none", "null")
    if own == other or own not in table or not (none or other in table):
        return
    reachable = {} if none else choice.reachable(table[other], options)
    foreign = [key for key in options if key in kept and key in choice.reachable(table[own]) and key not in reachable]
    if foreign:
        told = ", ".join(f"{key} ({places.get(f'{name}.{key}', '')})" for key in foreign)
        log.warning(f"{name}: {told}: of {own}, and no option of {other}, which the flags ask for; left out.")
    for key in foreign:
        del options[key]


def _split(names: Names, tokens: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The flags as (name, text, how it was spelled)."""
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token == "--set" and rest:
            token = rest.pop(0)
            if "=" not in token:
                raise LorakitError(f"--set {token}: expected NAME=VALUE, for example --set rank=8")
        token = token.removeprefix("--set=")
        if re.match(r"^(--)?[A-Za-z][\w.\-]*=", token):
            name, _, text = token.partition("=")
            yield name.removeprefix("--"), text, name
            continue
        if not token.startswith("--") or len(token) < 3:
            raise LorakitError(f'"{token}": expected --NAME VALUE or NAME=VALUE, for example --rank 8 or rank=8')
        name = token.removeprefix("--")
        switch = names.switch(name)
        if switch is not None and not (rest and rest[0].lower() in ("true", "false")):
            yield (*switch, token)
        elif not rest or rest[0].startswith("--"):
            names.path(name, f"the flags ({token})", token)  # an unknown name is the better complaint
            raise LorakitError(f"{token}: expected a value after it, found {rest[0] if rest else 'nothing'}")
        else:
            yield name, rest.pop(0), token
