"""GLoRA: weights and biases are scaled, shifted, and the bias learns through the weight, all at once.

    W ← W + W ∘ A + B, b ← b + b ∘ D + E + W c          c, D and E where the layer has a bias

A and B (out, in) are each a product X_d X_u of two thin matrices, a number for each output, one number, or nothing; c (in,) a
product, whole, or nothing; D and E (out,) whole, one number, or nothing. All start at zero. Chavan et al. 2023, arXiv
2306.07967.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import rank_option

Support = Literal["lora", "vector", "constant", "none"]


def _sizes(shape: Shape, spec: GLoRA) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The letter and sizes of every trained tensor of a matrix."""
    sides = {"A": (shape.out, shape.in_, spec.matrices), "B": (shape.out, shape.in_, spec.matrices)}
    if shape.bias:
        sides |= {"C": (shape.in_, 1, spec.inputs), "D": (shape.out, 0, spec.biases), "E": (shape.out, 0, spec.biases)}
    for letter, (rows, columns, support) in sides.items():
        if support == "lora":
            yield f"{letter}_d", (rows, spec.rank)
            yield f"{letter}_u", (spec.rank, columns)
        elif support != "none":
            yield letter, (1,) if support == "constant" else (rows, 1) if columns else (rows,)


@dataclass(frozen=True, kw_only=True)
class GLoRA(Method):
    """The options of GLoRA."""

    name = "glora"
    card = Card(
        title="GLoRA",
        formula="W ← W + W ∘ A + B, b ← b + b ∘ D + E + W c",
        parameters=lambda shape, spec: sum(math.prod(size) for _, size in _sizes(shape, spec)),
        paper="arXiv 2306.07967",
        use="When biases and gains should move with the weights, in vision models above all.",
    )

    rank: int = rank_option(8, "rank of the products among A, B and c", pattern=None)
    matrices: Support = option(
        "lora", "what A and B are: a product, a number per output, one, or none", peft="config_A_B"
    )
    inputs: Literal["lora", "vector", "none"] = option("lora", "what c is: a product, whole, or none", peft="config_C")
    biases: Literal["vector", "constant", "none"] = option(
        "constant", "what D and E are: whole, one number, or none", peft="config_D_E"
    )


class GLoRADelta(Delta, of=GLoRA):
    """The tensors of one matrix by letter; of a product X_d and X_u, the one after the other."""

    def __init__(self, spec: GLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        for letter, size in _sizes(shape, spec):
            start = torch.zeros(size)
            if letter.endswith("_u"):
                start.uniform_(-1, 1).div_(math.sqrt(size[1]))
            setattr(self, letter, nn.Parameter(start))

    def support(self, letter: str) -> Tensor | None:
        """A, B, C (in, 1), D or E, to be broadcast; None where it is none."""
        if f"{letter}_d" in self._parameters:
            return self.get_parameter(f"{letter}_d") @ self.get_parameter(f"{letter}_u")
        return self._parameters.get(letter)

    def dense(self, W: Tensor) -> Tensor:
        A, B = self.support("A"), self.support("B")
        change = torch.zeros_like(W) if A is None else W * A
        return change if B is None else change + B

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        if b is None:
            return None
        c, D, E = (self.support(letter) for letter in "CDE")
        parts = [b * D] if D is not None else []
        parts += [E.expand(self.shape.out)] if E is not None else []
        parts += [(W().to(c.dtype) @ c).squeeze(1)] if c is not None else []
        return sum(parts[1:], parts[0]) if parts else None
