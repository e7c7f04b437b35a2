"""Experts between formats: one layer for each matrix of each expert, MODULE.3.gate_proj, whatever a file or a model stacks.

transformers holds gate and up of all experts as one parameter, with the rows of the two in blocks or in turn; MLX and GGUF
have gate, up and down apart, each stacked over experts. The base says how its parameters lie; nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.conversion.description import Layer
from lorakit.core.delta import Shape
from lorakit.core.layout import Expert, Linear
from lorakit.errors import LorakitError
from lorakit.files.experts import EXPERT_MATRICES, Stack, joined
from lorakit.methods import LoRA

EXPERT = "expert"
"""The kind of layout of an expert's matrix."""
MATRICES = ("gate_proj", "up_proj", "down_proj")
_PLACE = re.compile(rf"(?P<module>.+)\.(?P<expert>\d+)\.(?P<matrix>{'|'.join(EXPERT_MATRICES)})")
_OF_MODEL = re.compile(rf".+\.(?:(?:{'|'.join(EXPERT_MATRICES)})|mlp\.v1|(?:input|output)_linear\.weight)\.\d+")
_KINDS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

Stacked = dict[str, dict[str, dict[int, Layer]]]
"""Module -> matrix ("gate_proj") -> expert -> layer."""


def unsplit(path: str) -> bool:
    """Whether a path is that of one expert in a parameter of a model, PARAMETER.3."""
    return _OF_MODEL.fullmatch(path) is not None


def expert_layout(layer: Layer, index: int, count: int) -> Layer:
    """The layer as an expert's."""
    inner = layer.layout
    return replace(layer, layout=Expert(Linear(Shape(inner.shape.out, inner.shape.in_, bias=False)), index, count))


def apart(layers: Mapping[str, Layer]) -> tuple[dict[str, Layer], Stacked]:
    """Layers that are none of an expert's, and the experts' by module and matrix."""
    plain: dict[str, Layer] = {}
    stacked: Stacked = {}
    for path, layer in layers.items():
        found = _PLACE.fullmatch(path)
        if found is None or not (layer.layout.kind == EXPERT or found["module"].endswith("experts")):
            plain[path] = layer
            continue
        matrices = stacked.setdefault(found["module"], {})
        matrices.setdefault(_KINDS[EXPERT_MATRICES[found["matrix"]]], {})[int(found["expert"])] = layer
    return plain, stacked


def unstacked(A: Tensor, B: Tensor, where: str) -> list[tuple[Tensor, Tensor]]:
    """(A (rank, in), B (out, rank)) of each expert, of A (experts, rank, in) and B (experts, out, rank)."""
    if A.ndim != 3 or B.ndim != 3 or len(A) != len(B) or A.shape[1] != B.shape[2]:
        raise LorakitError(
            f"convert: {where} has factors of {tuple(A.shape)} and {tuple(B.shape)}; experts' are (experts, rank, in) and "
            "(experts, out, rank), of as many experts."
        )
    return list(zip(A, B, strict=True))


def stacked(experts: Mapping[int, Layer], count: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (experts, rank, in) and B (experts, out, rank); an expert that is not there changes nothing."""
    first = next(iter(experts.values()))
    A = first.tensors["A"].new_zeros(count, rank, first.layout.shape.in_)
    B = first.tensors["B"].new_zeros(count, first.layout.shape.out, rank)
    for index, layer in experts.items():
        A[index, : layer.rank], B[index, :, : layer.rank] = layer.tensors["A"], layer.tensors["B"]
    return A, B


def count_of(experts: Mapping[int, Layer], module: str, stacks: Mapping[str, Stack]) -> int:
    """How many experts a module has; the base says it where a file has not all of them."""
    of_base = [stack.layout.count for place, stack in stacks.items() if place.rpartition(".")[0] == module]
    of_file = [layer.layout.count for layer in experts.values() if isinstance(layer.layout, Expert)]
    return next(iter([*of_base, *of_file]), max(experts) + 1)


def _needs_lora(path: str, layer: Layer) -> LoRA:
    if not isinstance(layer.method, LoRA):
        raise LorakitError(
            f"convert: {path} is an expert's matrix under {layer.method.name}, and experts are converted as LoRA. `lorakit "
            "resize --energy 1.0` (with the base model) makes one of it."
        )
    return layer.method


def split(path: str, layer: Layer, stack: Stack) -> dict[str, Layer]:
    """One expert of one of the base's parameters, as a file of PEFT's has it, as a layer for each of its matrices."""
    _needs_lora(path, layer)
    place, _, number = path.rpartition(".")
    module, shape = place.rpartition(".")[0], stack.layout.shape
    A, B = layer.tensors["A"], layer.tensors["B"]
    if stack.turned:
        A, B = B.T, A.T
    if (B.shape[0], A.shape[1]) != (shape.out, shape.in_):
        raise LorakitError(
            f"convert: {path} is {shape.out} × {shape.in_} in the base, and the adapter's is {B.shape[0]} × {A.shape[1]}: it "
            "was made for another base, or by a version of PEFT that laid the factors the other way (lk.load reads those)."
        )
    kind = EXPERT_MATRICES.get(stack.name)
    if kind == "gate_up":
        halves = B.chunk(2) if getattr(stack.module, "is_concatenated", True) else (B[0::2], B[1::2])
        parts = dict(zip(("gate_proj", "up_proj"), halves, strict=True))
    elif kind in _KINDS:
        parts = {_KINDS[kind]: B}
    else:
        raise LorakitError(
            f"convert: {place} is a stack of experts that no other format has a name for. Merge the adapter into its base."
        )
    return {
        f"{module}.{number}.{name}": Layer(
            layer.method,
            Expert(Linear(Shape(part.shape[0], A.shape[1], bias=False)), int(number), stack.layout.count),
            {"A": A.contiguous(), "B": part.contiguous()},
        )
        for name, part in parts.items()
    }


def fused(
    module: str, matrices: Mapping[str, Mapping[int, Layer]], stacks: Mapping[str, Stack]
) -> dict[str, tuple[LoRA, Tensor, Tensor]]:
    """Experts as the base's parameters: name -> (spec, A (experts, rank, in), B (experts, out, rank)), as PEFT lays them."""
    result: dict[str, tuple[LoRA, Tensor, Tensor]] = {}
    own = {stack.name: stack for place, stack in stacks.items() if place.rpartition(".")[0] == module}
    if not own:
        raise LorakitError(
            f"convert: {module} has experts, which PEFT's format has as the base's own parameters; pass --base (a folder with "
            "config.json, or a name on the hub), whose modules say how."
        )
    for name, stack in own.items():
        kind = EXPERT_MATRICES.get(name, name)
        wanted = ("gate_proj", "up_proj") if kind == "gate_up" else (_KINDS.get(kind, ""),)
        held = {matrix: matrices[matrix] for matrix in wanted if matrix in matrices}
        if not held:
            continue
        first = next(iter(next(iter(held.values())).values()))
        scale, pairs = first.scale, {}
        for index in sorted({index for experts in held.values() for index in experts}):
            parts = [
                None if (one := held.get(matrix, {}).get(index)) is None else one.scaled(scale) for matrix in wanted
            ]
            factors = [None if one is None else (one.tensors["B"], one.tensors["A"]) for one in parts]
            pair = joined(factors[0], factors[1], stack) if len(wanted) == 2 else factors[0]
            assert pair is not None
            _check_size(f"{module}.{index}.{wanted[0]}", pair, stack)
            pairs[index] = (pair[0].T, pair[1].T) if stack.turned else (pair[1], pair[0])
        rank = max(len(A) for A, _ in pairs.values())
        A0, B0 = next(iter(pairs.values()))
        A, B = A0.new_zeros(stack.layout.count, rank, A0.shape[1]), B0.new_zeros(stack.layout.count, len(B0), rank)
        for index, (one_A, one_B) in pairs.items():
            A[index, : len(one_A)], B[index, :, : len(one_A)] = one_A, one_B
        result[name] = LoRA(rank=rank, alpha=scale * rank), A, B
    return result


def _check_size(path: str, pair: tuple[Tensor, Tensor], stack: Stack) -> None:
    found, shape = (pair[0].shape[0], pair[1].shape[1]), stack.layout.shape
    if found != (shape.out, shape.in_):
        raise LorakitError(
            f"convert: {path} would make a change of {found[0]} × {found[1]} of {stack.name}, which is {shape.out} × "
            f"{shape.in_} in the base: it was made for another base."
        )


def as_stack(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's two tensors of a stack: A (experts · rank, in), B (out, rank · experts)."""
    return A.flatten(0, 1), torch.movedim(B, 0, -1).flatten(1)


__all__ = [
    "EXPERT",
    "MATRICES",
    "apart",
    "as_stack",
    "count_of",
    "expert_layout",
    "fused",
    "split",
    "stacked",
    "unsplit",
    "unstacked",
]
