"""Flags over a file: finds the option that a flag means, and puts its text into the tree of values.

`--train.max-steps 20`, `--train.max_steps=20`, `--set train.max_steps=20` and `train.max_steps=20` are one
thing. The text stays text until the option's type reads it, so `--model 123` is a name and `--rank 1e1` an
error.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import LorakitError
from lorakit.train.config.choices import initialisers, methods, option_names, quantisations
from lorakit.train.config.fields import config_fields
from lorakit.train.config.options import TrainConfig
from lorakit.train.config.schema import FlagText, hints_of, iterate

log = logging.getLogger("lorakit")

CHOSEN = ("method", "init", "quantize")
"""Options that hold a name and further options."""

FOREIGN = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "layers_to_transform": "layers",
    "init_lora_weights": "init",
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset": "data.train",
    "max_seq_length": "data.max_length",
    "output_dir": "train.output",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.evaluation_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.scheduler",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "label_smoothing_factor": "train.label_smoothing",
    "gradient_checkpointing": "train.memory",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "load_best_model_at_end": "train.keep_best",
    "resume_from_checkpoint": "train.resume",
    "loraplus_lr_ratio": "train.loraplus_ratio",
}
"""Names that PEFT, the Hugging Face Trainer and others use, to ours: for the hint of a refusal, never as aliases."""


def refuse_name(asked: str, where: str | None) -> LorakitError:
    """The error for an option that does not exist, with the nearest that does and those of the same section."""
    known = known_names()
    section, _, leaf = asked.rpartition(".")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    place = f" in {where}" if where else ""
    if leaf in FOREIGN or same_leaf:
        hint = f'; lorakit calls it "{FOREIGN.get(leaf) or same_leaf[0]}".'
    else:
        hint = f'; did you mean "{near[0]}"?' if near else "."
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    if not section:
        siblings += dict.fromkeys(name.partition(".")[0] for name in known if "." in name)
    return LorakitError(f'unknown option "{asked}"{place}{hint} Known: {", ".join(siblings or known)}.')


def known_names() -> list[str]:
    """The dotted names of all options, those of methods under their short names."""
    own = [name for name, _, _ in iterate(TrainConfig)]
    return own + [name for name in method_option_names() if name not in own]


def method_option_names() -> list[str]:
    """The options of all methods, each once."""
    table = methods()
    return list(dict.fromkeys(name for spec in table.values() for name in option_names(spec, table)))


def lift_method_options(tree: dict[str, Any], places: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Moves a file's `rank: 8` to `method: {rank: 8}`, its owner, and refuses names that nothing owns.

    Returns:
        A new tree and new places; the arguments are left as they are.
    """
    tree, places = dict(tree), dict(places)
    options = method_option_names()
    own = hints_of(TrainConfig)
    for name in CHOSEN:
        if isinstance(tree.get(name), dict):
            tree[name] = dict(tree[name])
        elif name in tree and not dataclasses.is_dataclass(tree[name]):
            tree[name] = {"name": tree[name]}
    for key in list(tree):
        where = places.get(key)
        if key in own:
            section = own[key]
            if dataclasses.is_dataclass(section) and isinstance(section, type) and isinstance(tree[key], dict):
                fields = {field.name for field in dataclasses.fields(section)}
                tree[key] = dict(tree[key])
                for inner in tree[key]:
                    if inner not in fields:
                        raise refuse_name(f"{key}.{inner}", places.get(f"{key}.{inner}"))
            continue
        if key not in options:
            raise refuse_name(key, where)
        method = tree.setdefault("method", {"name": "lora"})
        if key in method:
            raise LorakitError(
                f"{key} is given twice: {where} and {places.get(f'method.{key}')} (as method.{key}); keep one"
            )
        method[key] = tree.pop(key)
        places[f"method.{key}"] = where or ""
    if isinstance(tree.get("method"), dict):
        tree["method"].setdefault("name", "lora")
    return tree, places


def apply_overrides(tree: dict[str, Any], places: dict[str, str], tokens: Sequence[str]) -> None:
    """Puts the values of flags into `tree`, and the flags' spelling into `places`.

    Where a flag names another method than the file, options of the file's method that the other one does not have
    are left out, with a line in the log; what the flags themselves give must fit.

    Raises:
        LorakitError: an unknown flag, a flag without a value, a word that is no flag.
    """
    before = {name: dict(tree[name]) for name in CHOSEN if isinstance(tree.get(name), dict)}
    flags: set[tuple[str, ...]] = set()
    for asked, text, spelled in _split(tokens):
        path = _path_of(asked, spelled)
        flags.add(path[:2])
        target = tree
        for part in path[:-1]:
            inner = target.get(part)
            if not isinstance(inner, dict):
                inner = {"name": inner} if inner is not None and path[0] in CHOSEN else {}
                target[part] = inner
            target = inner
        key = path[-1]
        value = FlagText(text)
        if len(path) == 1 and path[0] in CHOSEN and not text.lstrip().startswith("{"):
            # The name alone changes: options that the file gives stay where the new method has them.
            target = target.setdefault(path[0], {})
            key = "name"
        target[key] = value
        dotted = ".".join(path)
        places[dotted] = spelled
        if key == "name":
            places[f"{dotted.removesuffix('.name')}.name"] = spelled
    if isinstance(tree.get("method"), dict):
        tree["method"].setdefault("name", "lora")
    for name, options in before.items():
        if isinstance(tree[name], dict):
            kept = {key for key in options if (name, key) not in flags}
            _leave_out(name, kept, str(options.get("name")), tree[name], places)


def _leave_out(name: str, kept: set[str], own: str, options: dict[str, Any], places: Mapping[str, str]) -> None:
    """Takes out of `options` what a file gave for its choice `own` (`kept`) and the one that a flag names does not have."""
    table = {"method": methods, "init": initialisers, "quantize": quantisations}[name]()
    other = str(options.get("name"))
    none = name == "quantize" and other in ("none", "null")
    if own == other or own not in table or not (none or other in table):
        return
    reachable = {} if none else option_names(table[other], table, options)
    foreign = [
        key for key in options if key in kept and key in option_names(table[own], table) and key not in reachable
    ]
    if foreign:
        told = ", ".join(f"{key} ({places.get(f'{name}.{key}', '')})" for key in foreign)
        log.warning(f"{name}: {told}: of {own}, and no option of {other}, which the flags ask for; left out.")
    for key in foreign:
        del options[key]


def _path_of(asked: str, spelled: str) -> tuple[str, ...]:
    """The option a flag means, as keys into the tree; options of methods under `method`."""
    fields = {name: hint for name, _, hint in iterate(TrainConfig)}
    name = asked.replace("-", "_")
    if name in fields:
        return tuple(name.split("."))
    for field, hint in fields.items():
        if name.startswith(field + "."):
            if field in CHOSEN:
                return tuple(name.split("."))
            if typing.get_origin(hint) is dict:  # a key of a mapping may hold dots and dashes
                return (*field.split("."), asked[len(field) + 1 :])
    if name in method_option_names():
        return ("method", name)
    sections = {field.partition(".")[0] for field in fields if "." in field}
    if name in sections:
        inside = ", ".join(field for field in fields if field.startswith(name + "."))
        raise LorakitError(f"{spelled}: {name} is a section; set one of its options: {inside}")
    raise refuse_name(name, f"the flags ({spelled})")


def _split(tokens: Sequence[str]) -> list[tuple[str, str, str]]:
    """The flags as (name, text, how it was spelled)."""
    found: list[tuple[str, str, str]] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token == "--set" and rest:
            token = rest.pop(0)
            if "=" not in token:
                raise LorakitError(f"--set {token}: expected NAME=VALUE, for example --set rank=8")
        elif token.startswith("--set="):
            token = token.removeprefix("--set=")
        if re.match(r"^(--)?[A-Za-z][\w.\-]*=", token):
            name, _, text = token.partition("=")
            found.append((name.removeprefix("--"), text, name))
            continue
        if not token.startswith("--") or len(token) < 3:
            raise LorakitError(f'"{token}": expected --NAME VALUE or NAME=VALUE, for example --rank 8 or rank=8')
        name = token.removeprefix("--")
        switch = _switch(name)
        if switch is not None and not (rest and rest[0].lower() in ("true", "false")):
            found.append((*switch, token))
        elif not rest or rest[0].startswith("--"):
            _path_of(name, token)  # an unknown name is the better complaint
            raise LorakitError(f"{token}: expected a value after it, found {rest[0] if rest else 'nothing'}")
        else:
            found.append((name, rest.pop(0), token))
    return found


def _switch(name: str) -> tuple[str, str] | None:
    """The option and text a bare flag means: `--x` is true and `--no-x` false, for options that are true or false."""
    switches = {field.name for field in config_fields() if field.is_switch}
    plain = name.replace("-", "_")
    if plain in switches:
        return plain, "true"
    if plain.startswith("no_") and plain[3:] in switches:
        return plain[3:], "false"
    return None
