"""Stacks of experts in a file that is read without its base model: each expert's pair by itself, and back into the file's
form.

PEFT's configuration names the parameters (`target_parameters`) and their rank, which with the rows of A gives the number of
experts. What is lost without the base is whether a matrix lies (in, out); norms, sums and cuts do not ask for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakit.core.walking import exactly, has_suffix, value_for
from lorakit.errors import LorakitError
from lorakit.files.experts import EXPERT_MATRICES, check_order, is_grouped
from lorakit.files.pairs import pair_of

MARKER = {"lora_B_layout": "rank_major"}
"""The entry of adapter_config.json that says how the columns of a stack's B lie, for files without lorakit.json."""


@dataclass(frozen=True)
class StackedPair:
    """The factors of all experts of one parameter.

    Attributes:
        place: its name, "model.layers.0.mlp.experts.down_proj"; that of one expert's matrix has ".3" behind.
        keys: the names of A (experts · rank, in) and B (out, rank · experts) in the file.
        count: of experts.
        rank: of each.
    """

    place: str
    keys: tuple[str, str]
    count: int
    rank: int

    def expert(self, index: int) -> str:
        """The name of one expert's matrix."""
        return f"{self.place}.{index}"

    def split(self, A: Tensor, B: Tensor, grouped: bool) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each expert; `grouped`: the columns of B lie expert by expert."""
        sizes = (self.count, self.rank)
        apart = B if B.ndim == 3 else B.unflatten(1, sizes).mT if grouped else B.unflatten(1, sizes[::-1])
        return [(one, apart[..., index]) for index, one in enumerate(A if A.ndim == 3 else A.unflatten(0, sizes))]

    @property
    def module(self) -> str:
        """The path of the module that has the parameter."""
        return self.place.rpartition(".")[0]

    def join(self, pairs: Mapping[int, tuple[Tensor, Tensor]], rank: int, depth: int) -> dict[str, Tensor]:
        """PEFT's tensors of these experts' (A, B), all of `rank`, within `depth` other parameters of the module; an expert
        that is not there changes nothing."""
        A, B = next(iter(pairs.values()))
        As = A.new_zeros(self.count, rank, A.shape[1])
        Bs = B.new_zeros(B.shape[0], rank, self.count)
        for index, (A, B) in pairs.items():
            As[index, : len(A)], Bs[:, : len(A), index] = A, B
        stem = f"{self.prefix}{self.module}{'.base_layer' * depth}"
        return {f"{stem}.lora_A.weight": As.flatten(0, 1), f"{stem}.lora_B.weight": Bs.flatten(1)}

    @property
    def prefix(self) -> str:
        """What the file has before the module's path."""
        return self.keys[0][: self.keys[0].index(self.module)]


@dataclass(frozen=True)
class Unstacked:
    """A file with every expert's pair under a name of its own.

    Attributes:
        tensors, config: as a file has them, with ranks and scales for each expert.
        stacks: what was taken apart, by name of the parameter.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    stacks: dict[str, StackedPair]


def unstack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str, trusted: bool = False) -> Unstacked:
    """A file's tensors with those of stacks of experts taken apart; all others as they are.

    Args:
        tensors, config: of the file.
        where: the file, for messages.
        trusted: the file is lorakit's own, so that the order of its columns is known.

    Raises:
        LorakitError: the file cannot tell which parameter a stack is of, or how it lies.
    """
    stacks = _found(tensors, config, where)
    if not stacks:
        return Unstacked(dict(tensors), dict(config), {})
    if not trusted:
        check_order(config, [(tensors[stack.keys[1]], stack.count) for stack in stacks.values()])
    taken = {key for stack in stacks.values() for key in stack.keys}
    result = {key: tensor for key, tensor in tensors.items() if key not in taken}
    changed = dict(config)
    for option in ("rank_pattern", "alpha_pattern"):
        own = config.get(option) or {}
        values = {place: value_for(own, place) for place in stacks}
        experts = {rf"{exactly(place)}\.\d+": value for place, value in values.items() if value is not None}
        changed[option] = {**experts, **own}
    for place, stack in stacks.items():
        A, B = (tensors[key] for key in stack.keys)
        for index, pair in enumerate(stack.split(A, B, is_grouped(config, place.rpartition(".")[2]))):
            for letter, tensor in zip("AB", pair, strict=True):
                result[f"{stack.prefix}{stack.expert(index)}.lora_{letter}.weight"] = tensor
    return Unstacked(result, changed, stacks)


def _found(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, StackedPair]:
    """The stacks of a file: of a module's pairs, wrapped one around the other, the outermost is its last parameter's."""
    wrapped: dict[str, dict[int, tuple[str, str]]] = {}
    for key in tensors:
        found = pair_of(key)
        if found is not None and found[1] == key and found[2] in tensors and tensors[key].ndim in (2, 3):
            module = re.sub(r"(\.base_layer)+$", "", found[0])
            wrapped.setdefault(module, {})[found[0].count(".base_layer")] = found[1:]
    stacks: dict[str, StackedPair] = {}
    for module, pairs in wrapped.items():
        path = module.removeprefix("base_model.model.")
        names = _parameters(path, config)
        own = [
            (keys, stack)
            for (_, keys), name in zip(sorted(pairs.items()), reversed(names), strict=False)
            if (stack := _stack(f"{path}.{name}", keys, tensors, config)) is not None
        ]
        if own and len(names) != len(pairs):
            raise LorakitError(
                f"{where} holds {len(pairs)} pairs of factors for the parameters of {path}, and target_parameters of its "
                f"configuration names {len(names)} ({', '.join(names)}). Load it onto its base model instead."
            )
        stacks |= {stack.place: stack for _, stack in reversed(own)}
    return stacks


def _parameters(path: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters of a module that a configuration targets, in the order in which modules define them."""
    asked = [str(one) for one in config.get("target_parameters") or ()]
    names = dict.fromkeys(
        one.rpartition(".")[2] for one in asked if has_suffix(f"{path}.{one.rpartition('.')[2]}", one)
    )
    return sorted(names, key=lambda name: ("gate_up", "gate", "up", "down").index(EXPERT_MATRICES.get(name, "gate")))


def _stack(
    place: str, keys: tuple[str, str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> StackedPair | None:
    """The stack of these factors; None where they are one matrix's."""
    A, B = (tensors[key] for key in keys)
    if A.ndim == 3:
        return StackedPair(place, keys, A.shape[0], A.shape[1]) if B.ndim == 3 and len(A) == B.shape[2] else None
    rank = value_for(config.get("rank_pattern") or {}, place) or config.get("r", len(A))
    if B.ndim != 2 or len(A) != B.shape[1] or len(A) <= rank or len(A) % rank:
        return None
    return StackedPair(place, keys, len(A) // rank, rank)


__all__ = ["MARKER", "StackedPair", "Unstacked", "unstack"]
