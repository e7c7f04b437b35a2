"""The configuration of a training run: one frozen dataclass, one YAML file, and a flag for every option.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    method: lora
    rank: 16
    data: {train: reviews.jsonl, evaluation_size: 500}
    train: {output: adapters/reviews, learning_rate: 5e-4}

`load_config("run.yaml", ["--rank", "8", "--train.max-steps", "20"])` reads the file, then the flags, which
win. The flags are the dotted names of the options; `_` and `-` are the same. `--set rank=8` and `rank=8` say
it too.

One option has one owner. What belongs to a method (`rank`, `alpha`, `dropout`, ...) is held by its spec in
`method`; `rank: 8` at the top of a file and `--rank 8` are spellings of `method.rank`, and `to_yaml` writes
the owner's. Paths are relative to the working directory. The same file, written by `to_yaml` with every
default filled in, is kept beside the adapter, so that a run can be repeated after the defaults have moved on.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.train.config.document import dump, parse_document
from lorakit.train.config.fields import ConfigField, config_fields
from lorakit.train.config.options import DataOptions, EvaluateOptions, TrainConfig, TrainOptions
from lorakit.train.config.overrides import apply_overrides, lift_method_options
from lorakit.train.config.schema import Origins, build, plain

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
    tree: dict[str, Any] = {}
    places: dict[str, str] = {}
    if path is not None:
        tree, places = parse_document(_read_text(Path(path)), str(path))
    tree, places = lift_method_options(tree, places)
    apply_overrides(tree, places, overrides)
    origins = Origins(places)
    try:
        return build(TrainConfig, tree, "", origins)
    except LorakitError as error:
        # Checks across options know no lines; the file at least is named.
        if (
            path is not None
            and str(path) not in str(error)
            and not any(place in str(error) for place in places.values())
        ):
            raise LorakitError(f"{error} ({path})") from None
        raise


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        found = f"; {path.parent} holds {', '.join(near[:8])}" if near else ""
        raise LorakitError(f"load_config: there is no file {path}{found}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LorakitError(f"load_config: {path} cannot be read as UTF-8 text: {error}") from None


def to_tree(config: Any) -> dict[str, Any]:
    """A configuration as plain values, every option written out, methods by name."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        writer = field.metadata.get("writer")
        if writer:
            tree[field.name] = writer(value)
        elif dataclasses.is_dataclass(value):
            tree[field.name] = to_tree(value)
        else:
            tree[field.name] = plain(value)
    return tree


def to_yaml(config: TrainConfig, comments: bool = True) -> str:
    """The configuration as a YAML file that reads back equal, each option under its one-line doc."""
    return _render(config, to_tree(config), "", comments)


def _render(section: Any, tree: dict[str, Any], indent: str, comments: bool) -> str:
    lines: list[str] = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value) and not field.metadata.get("writer"):
            doc = (type(value).__doc__ or "").strip().splitlines()[0]
            body = _render(value, tree[field.name], indent + "  ", comments)
            lines.append(f"\n{indent}# {doc}\n{indent}{field.name}:\n{body}" if comments else f"{field.name}:\n{body}")
            continue
        if comments and field.metadata["doc"]:
            wrapped = textwrap.wrap(field.metadata["doc"], 106 - len(indent), break_on_hyphens=False)
            lines += [f"{indent}# {line}\n" for line in wrapped]
        lines.append(textwrap.indent(dump({field.name: tree[field.name]}), indent))
    return "".join(lines)
