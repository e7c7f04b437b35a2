"""The configuration of a training run: one model, one YAML file, and a flag for every option.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    method: lora
    rank: 16
    data: {train: reviews.jsonl, evaluation_size: 500}
    train: {output: adapters/reviews, learning_rate: 5e-4}

`load_config("run.yaml", ["--rank", "8", "--train.max-steps", "20"])` reads the file, then the flags, which win. The flags are
the dotted names of the options; `_` and `-` are the same. `--set rank=8` and `rank=8` say it too.

One option has one owner. What belongs to a method (`rank`, `alpha`, `dropout`, ...) is held by its spec in `method`; `rank: 8`
at the top of a file and `--rank 8` are spellings of `method.rank`, and `to_yaml` writes the owner's. Paths are relative to the
working directory. The same file, written by `to_yaml` with every default filled in, is kept beside the adapter, so that a run
can be repeated after the defaults have moved on.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit.errors import LorakitError, unknown
from lorakit.reading import read_text
from lorakit.train.config.choices import METHOD
from lorakit.train.config.document import dump, parse_document
from lorakit.train.config.fields import ConfigField, config_fields
from lorakit.train.config.flags import merged
from lorakit.train.config.foreign import program_of
from lorakit.train.config.options import DataOptions, EvaluateOptions, TrainConfig, TrainOptions
from lorakit.train.config.section import Section, explained

__all__ = [
    "ConfigField",
    "DataOptions",
    "EvaluateOptions",
    "TrainConfig",
    "TrainOptions",
    "config_fields",
    "load_config",
    "to_tree",
    "to_yaml",
]


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a run's file, then the overrides, which win over it; the last of two equal overrides wins.

    Args:
        path: the YAML file; None when flags say everything.
        overrides: `rank=8`, `--set rank=8`, `--rank 8`, `--rank=8`, `--data.completion-only-loss`,
            `--no-data.completion-only-loss`, as they stood on the command line.

    Raises:
        LorakitError: unknown options (with the nearest known), wrong types, values out of range, missing options;
            each names the option and the file and line or the flag.
    """
    tree, places = _given(path, overrides)
    return _validated(tree, places)


def from_tree(tree: Mapping[str, Any], source: str) -> TrainConfig:
    """The configuration of plain values, as a file `source` would hold them."""
    inner = [f"{key}.{name}" for key, value in tree.items() if isinstance(value, Mapping) for name in value]
    values, places = merged(tree, dict.fromkeys(["", *tree, *inner], source), ())
    return _validated(values, places)


def _validated(tree: Mapping[str, Any], places: Mapping[str, str]) -> TrainConfig:
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise explained(error, "", places) from None


def chosen_method(path: str | Path | None, overrides: Sequence[str]) -> str:
    """The name of the method that a file and flags ask for; empty where they name none."""
    name = str(METHOD.named(_given(path, overrides)[0].get("method", "")))
    if name and name not in METHOD.table():
        raise unknown("method", name, METHOD.table())
    return name


def _given(path: str | Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the file and the flags, and where each was given."""
    tree, places = ({}, {}) if path is None else parse_document(_document(path), str(path))
    if program := program_of(tree):
        raise LorakitError(
            f"{path} is a file of {program}; `lorakit init --from {path} -o run.yaml` writes it as one of lorakit's"
        )
    return merged(tree, places, overrides)


def _document(path: str | Path) -> str:
    """The text of a run's file."""
    if Path(path).is_dir():
        files = ", ".join(sorted(one.name for one in Path(path).glob("*.y*ml"))[:8]) or "no YAML file"
        raise LorakitError(f'config: "{path}" is a folder; name the YAML file of a run. It has {files}.')
    return read_text(path, "config")


def to_tree(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain values, every option written out, methods by name."""
    return config.model_dump(mode="json")


def to_yaml(config: TrainConfig, comments: bool = True) -> str:
    """The configuration as a YAML file that reads back equal, each option under its one-line doc."""
    return _render(config, to_tree(config), "", comments)


def _render(section: Section, tree: dict[str, Any], indent: str, comments: bool) -> str:
    lines: list[str] = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            body = _render(value, tree[name], indent + "  ", comments)
            lines.append(f"\n{indent}{name}:\n{body}" if comments else f"{name}:\n{body}")
            continue
        if comments and (heading := section.HEADINGS.get(name)):
            lines.append(f"{chr(10) * bool(lines)}{indent}# --- {heading} ---\n")
        if comments and info.description:
            wrapped = textwrap.wrap(info.description, 106 - len(indent), break_on_hyphens=False)
            lines += [f"{indent}# {line}\n" for line in wrapped]
        lines.append(textwrap.indent(dump({name: tree[name]}), indent))
    return "".join(lines)
