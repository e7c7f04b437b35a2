"""A file whose layers have names of other times: each layer under its name of today, fused and split ones too.

What is renamed is the layer's weight, by transformers' own table (`models/renaming.py`), and not the adapter's tensor. Where a
weight is cut along its outputs, so is B and A is kept; where weights are laid one upon the other, so are the A's, and B is
block by block. What happens to experts is told in `experts.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, WeightConverter

from lorakit.core.stacks import stacked_sites
from lorakit.core.walking import exactly, has_suffix, value_for, walk
from lorakit.errors import LorakitError
from lorakit.files.interchange import scale_in, unwrapped
from lorakit.models.renaming import Renaming, targets_of


@dataclass
class Names:
    """What the layers of a file are called today.

    Attributes:
        moved: old layer -> its names of today.
        fused: layer of today -> the converter that makes it, its old layers by the converter's pattern.
    """

    moved: dict[str, list[str]] = field(default_factory=dict)
    fused: dict[str, tuple[WeightConverter, dict[str, str]]] = field(default_factory=dict)


def nearest(names: Iterable[str], asked: Sequence[str]) -> str:
    """The model's names that are most like those asked for, to end a message; empty where none is alike."""
    known = [name for name in names if name]
    found = {one: difflib.get_close_matches(one, known, n=2, cutoff=0.6) for one in asked[:2]}
    told = [f"{one}: {', '.join(close)}" for one, close in found.items() if close]
    return f" The nearest names that it has are, for {'; for '.join(told)}." if told else ""


def under_todays_names(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module, plain: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors and configuration with its layers called as the model calls them.

    Raises:
        LorakitError: a layer was fused or split in a way that its tensors cannot follow, or two layers have become one.
    """
    known = {name for name in plain.values() if name}
    held = {plain[path] for path, module in walk(model) if any(True for _ in module.parameters(recurse=False))}
    lost = [key for key in tensors if not any(start in held for start in _starts(key))]
    if not lost:
        return dict(tensors), dict(config)
    stacks = {plain[path] for path, module in walk(model) if stacked_sites(module)}
    table = Renaming(unwrapped(model), (f"{name}.weight" for name in known))
    owners, names = _owners(lost, table, known, stacks)
    if not owners:
        return dict(tensors), dict(config)
    result: dict[str, Tensor] = {}
    own = dict(config)
    fused = {old for _, parts in names.fused.values() for old in parts.values()}
    apart: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        old = owners.get(key)
        tail = key if old is None else key.removeprefix(f"{old}.")
        if old is not None and (old in fused or len(names.moved[old]) > 1):
            apart.setdefault(old, {})[tail] = tensor
            continue
        name = key if old is None else f"{names.moved[old][0]}.{tail}"
        if name in result:
            raise LorakitError(f"load: the file holds {name!r} twice, under an older name and under today's.")
        result[name] = tensor
    for old, own_tensors in apart.items():
        if old not in fused:
            result |= _split(own_tensors, old, names.moved[old])
    _rename_config(own, tensors, owners, names, stacks, held)
    for new, (converter, parts) in names.fused.items():
        result |= _joined(own, config, apart, new, converter, parts, model, plain)
    return result, own


def _starts(key: str) -> Iterable[str]:
    """The names of modules that a key may be below, the longest first."""
    steps = key.split(".")
    return (".".join(steps[:count]) for count in range(len(steps) - 1, 0, -1))


def _owners(lost: Iterable[str], table: Renaming, known: set[str], stacks: set[str]) -> tuple[dict[str, str], Names]:
    """The old layer of each key for which the table has a name of today."""
    names, owners, tried = Names(), dict[str, str](), set[str]()
    for key in lost:
        for old in _starts(key):
            if old in names.moved:
                owners[key] = old
                break
            if old in tried:
                continue
            tried.add(old)
            weight, converter, pattern = table.of(f"{old}.weight")
            found = [one.removesuffix(".weight") for one in (targets_of(converter, weight) if converter else [weight])]
            part = table.renamed(f"{old}.weight").removesuffix(".weight")
            if old in known:
                continue
            if all(one in known for one in found):
                names.moved[old] = found
                if converter is not None and pattern is not None and len(converter.source_patterns) > 1:
                    names.fused.setdefault(found[0], (converter, {}))[1][pattern] = old
            elif part != old and any(start in stacks for start in (part, *_starts(f"{part}.x"))):
                names.moved[old] = [part]  # an expert's own matrix, or all of them: `experts.py` reads those
            else:
                continue
            owners[key] = old
            break
    return owners, names


def _pair(tensors: Mapping[str, Tensor], old: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a LoRA, which alone can be cut and joined."""
    if set(tensors) != {"lora_A.weight", "lora_B.weight"}:
        raise LorakitError(
            f"load: {old} is fused with others or cut in this version of transformers, which only a plain LoRA can follow; "
            f"the file holds {', '.join(sorted(tensors))} for it. Load it with the version of transformers it was made with."
        )
    return tensors["lora_B.weight"], tensors["lora_A.weight"]


def _refuse(converter: WeightConverter, old: str, new: str) -> LorakitError:
    steps = ", ".join(type(one).__name__ for one in converter.operations)
    return LorakitError(
        f"load: {old} has become {new} by {steps} in this version of transformers, which an adapter cannot follow. Load it "
        "with the version of transformers it was made with."
    )


def _split(tensors: Mapping[str, Tensor], old: str, new: Sequence[str]) -> dict[str, Tensor]:
    """One pair for each part of a weight that is cut along its outputs into equal parts."""
    B, A = _pair(tensors, old)
    parts = B.chunk(len(new))
    return {
        f"{name}.{key}": value.contiguous()
        for name, part in zip(new, parts, strict=True)
        for key, value in (("lora_A.weight", A), ("lora_B.weight", part))
    }


def _joined(
    config: dict[str, Any],
    told: Mapping[str, Any],
    apart: Mapping[str, dict[str, Tensor]],
    new: str,
    converter: WeightConverter,
    parts: Mapping[str, str],
    model: nn.Module,
    plain: Mapping[str, str],
) -> dict[str, Tensor]:
    """One pair for weights laid one upon the other, with the scale of the first; a part that the file lacks is zero."""
    if [type(one) for one in converter.operations] != [Concatenate] or cast(Any, converter.operations[0]).dim != 0:
        raise _refuse(converter, next(iter(parts.values())), new)
    pairs = {pattern: _pair(apart[old], old) for pattern, old in parts.items()}
    whole = next(module for path, module in walk(model) if plain[path] == new).get_parameter("weight").shape[0]
    sizes = {pattern: len(B) for pattern, (B, _) in pairs.items()}
    lacking = [pattern for pattern in converter.source_patterns if pattern not in pairs]
    rest = whole - sum(sizes.values())
    even = all(size * len(converter.source_patterns) == whole for size in sizes.values())
    if rest < 0 or (lacking and len(lacking) > 1 and not even) or (not lacking and rest):
        raise LorakitError(
            f"load: {', '.join(parts.values())} are parts of {new} now, which has {whole} outputs; those of the file have "
            f"{', '.join(map(str, sizes.values()))}, so that it cannot be told where they lie."
        )
    scales = {pattern: scale_in(told, old, len(pairs[pattern][1])) for pattern, old in parts.items()}
    scale, rank = next(iter(scales.values())), sum(len(A) for _, A in pairs.values())
    A = torch.cat([pairs[pattern][1] for pattern in pairs])
    B, row, column = A.new_zeros(whole, rank), 0, {}
    start = 0
    for pattern, (_, own) in pairs.items():
        column[pattern] = start
        start += len(own)
    for pattern in converter.source_patterns:
        if pattern in pairs:
            own_B, own_A = pairs[pattern]
            at = slice(column[pattern], column[pattern] + len(own_A))
            B[row : row + len(own_B), at] = own_B * (scales[pattern] / scale)
        row += sizes.get(pattern, rest // max(len(lacking), 1))
    config["rank_pattern"] = {exactly(new): rank, **(config.get("rank_pattern") or {})}
    alpha = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    config["alpha_pattern"] = {exactly(new): alpha, **(config.get("alpha_pattern") or {})}
    return {f"{new}.lora_A.weight": A, f"{new}.lora_B.weight": B}


def _rename_config(
    config: dict[str, Any],
    tensors: Iterable[str],
    owners: Mapping[str, str],
    names: Names,
    stacks: set[str],
    held: set[str],
) -> None:
    """The configuration under today's names: the layers are those that the file has tensors for."""
    layers: dict[str, None] = {}
    kept: dict[str, None] = {}
    for key in tensors:
        old = owners.get(key) or next((start for start in _starts(key) if start in held), None)
        if old is None or key.removeprefix(f"{old}.") in ("weight", "bias"):  # a bias, or a module that is saved whole
            continue
        if old not in names.moved:
            kept[old] = None
        for new in names.moved.get(old, [old]):
            if not any(start in stacks for start in (new, *_starts(f"{new}.x"))):
                layers[new] = None
    config |= {
        "target_modules": list(layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    for option in [key for key in config if key.endswith("_pattern") and isinstance(config[key], Mapping)]:
        asked = config[option]
        told = {
            exactly(new): value
            for old, news in names.moved.items()
            for new in news
            if new not in names.fused and (value := value_for(asked, old)) is not None
        }
        still = {key: value for key, value in asked.items() if any(value_for({key: True}, one) for one in kept)}
        config[option] = {**told, **still}
    saved: dict[str, None] = {}
    for name in config.get("modules_to_save") or ():
        found = [new for old, news in names.moved.items() if has_suffix(old, name) for new in news]
        saved.update(dict.fromkeys(found or [name]))
    if config.get("modules_to_save"):
        config["modules_to_save"] = list(saved)


__all__ = ["Names", "nearest", "under_todays_names"]
