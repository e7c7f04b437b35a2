"""Names of other times: what a model's tensors were called before, by transformers' own table of conversions.

transformers renames modules between its versions (LLaVA's `language_model.model.layers` is `model.language_model.layers` now,
ViT's `attention.attention.query` is `attention.q_proj`) and fuses or splits some on loading (a mixture's experts into stacks).
`from_pretrained` converts checkpoints by `get_model_conversion_mapping`; here it is asked what an old name is now.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Renaming:
    """Old name -> name of today, for the tensors of one model; for a model that is none of transformers', every name stays."""

    def __init__(self, model: nn.Module, known: Iterable[str]) -> None:
        """`known`: the model's tensors by their names of today."""
        self.known = dict.fromkeys(known, True)
        self.prefix = str(getattr(model, "base_model_prefix", "") or "") or None
        entries: Sequence[Any] = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else ()
        self.renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in entries if isinstance(entry, WeightConverter)]

    def of(self, name: str) -> tuple[str, WeightConverter | None, str | None]:
        """The name of today, and for a tensor that is fused or split the converter and its pattern that matched."""
        found, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.known)
        if found not in self.known and name in self.known:
            return name, None, None
        one = next((one for one in self.converters if pattern in one.source_patterns), None)
        return found, one, pattern

    def renamed(self, name: str) -> str:
        """The name by renamings alone: what a part of a fused tensor would be called today."""
        return rename_source_key(name, self.renamings, [], self.prefix, self.known)[0]


def targets_of(converter: WeightConverter, first: str) -> list[str]:
    """The names of all tensors that a converter makes, of which `first` is the first."""
    head, own, tail = first.rpartition(converter.target_patterns[0])
    return [f"{head}{one}{tail}" for one in converter.target_patterns] if own else [first]


Read = Callable[[str], Tensor]
"""A tensor of a checkpoint by the name that it has there."""


def converted(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Callable[[Read], Tensor]], set[str]]:
    """How each of a model's tensors comes of a checkpoint with these names, where another name or a conversion gives it: by
    what to call with a reader of the checkpoint; and which of the names are used so."""
    table = Renaming(model, model.state_dict())
    parts: dict[str, list[tuple[str, str]]] = {}
    makers: dict[str, WeightConverter] = {}
    made: dict[str, Callable[[Read], Tensor]] = {}
    used = set()
    for name in sorted(names, key=_in_order):
        found, converter, pattern = table.of(name)
        if found not in table.known or found == name:
            continue
        used.add(name)
        if converter is None or pattern is None:
            made[found] = lambda read, name=name: read(name)  # type: ignore[misc]
            continue
        makers[found] = converter
        parts.setdefault(found, []).append((name, pattern))
    for first, converter in makers.items():
        for one in targets_of(converter, first):
            made[one] = _maker(model, converter, first, parts[first], one)
    return made, used


def _maker(
    model: nn.Module, converter: WeightConverter, first: str, sources: Sequence[tuple[str, str]], name: str
) -> Callable[[Read], Tensor]:
    def make(read: Read) -> Tensor:
        own = copy.deepcopy(converter)
        for source, pattern in sources:
            own.add_tensor(first, source, pattern, cast(Any, lambda source=source: read(source)))
        found: Mapping[str, Any] = own.convert(first, model=model, config=model.config)
        value = found[name]
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor

    return make


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Numbers in a name as numbers: expert 10 comes after expert 9, as transformers orders what it stacks."""
    return [(step.isdigit(), int(step) if step.isdigit() else 0, step) for step in name.split(".")]
