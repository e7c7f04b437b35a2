"""LoKr: a Kronecker product of a small matrix and a low-rank one.

    ΔW = s (C ⊗ D)      C (o1, i1), D (o2, i2) = D_a D_b, out = o1 o2, in = i1 i2, s = alpha / rank, C starts at zero

It acts by reshapes and is never made for linear layers: with x as an (i1, i2) matrix X, `ΔW x` is `s C X Dᵀ`. A 576 → 1536
layer at rank 16 with the sizes nearest the square roots (24 · 24, 32 · 48) trains 32 · 24 + 16 · (48 + 24) = 1920 numbers.
The rank of ΔW is rank(C) · rank(D).

With `tucker` D of a convolution with a kernel is a Tucker decomposition of three tensors. D is stored whole where
rank >= max(o2, i2) / 2; C is a product `C_a C_b` only with decompose_both and rank below max(o1, i1) / 2. PEFT
divides by the rank in every case; LyCORIS takes s = 1 where both C and D are whole: scale_rule says which. For a
convolution C spans channels and D the rest with the kernel. (PEFT's files with a whole D on a Conv1d mean something
else: there C meets the wrong axes; they are refused, and ours are not called PEFT's.) Yeh et al. 2023, arXiv
2309.14859.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Delta, Form, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import Scaled, alpha_option, rank_option, tucker, tucker_option


def split_size(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `size`: the sizes of C and of D along one axis.

    A `factor` that divides `size` is C's. Otherwise the most balanced pair whose smaller number is at most `factor`
    (-1: any): 127 → (1, 127), 360 → (18, 20), 768 → (24, 32).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    smaller = max(divisor for divisor in range(1, most + 1) if size % divisor == 0)
    return smaller, size // smaller


@dataclass(frozen=True, kw_only=True)
class LoKr(Scaled):
    """The options of LoKr."""

    name = "lokr"
    card = Card(
        title="LoKr",
        formula="ΔW = s (C ⊗ D), D = D_a D_b, s = alpha / rank",
        parameters=lambda shape, spec: sum(map(math.prod, _sizes(shape, spec).values())),
        paper="arXiv 2309.14859",
        use="The smallest files at a high rank; common for diffusion models.",
    )

    rank: int = rank_option(8, "rank of D, and of C with decompose_both")
    alpha: float = alpha_option(8.0, peft="alpha")
    factor: int = option(
        -1,
        "size of C along each axis; -1 is as near the square root as the size has divisors",
        allows=lambda factor: factor == -1 or factor >= 1,
        shown="C's size along each axis, at least 1, or -1 for the most balanced sizes",
        peft="decompose_factor",
    )
    decompose_both: bool = option(False, "C is a low-rank product too, where that is smaller", peft="decompose_both")
    tucker: bool = tucker_option()
    scale_rule: Literal["peft", "lycoris"] = option(
        "peft", "peft: the scale is alpha / rank always; lycoris: 1 where C and D are whole"
    )


def _sizes(shape: Shape, spec: LoKr) -> dict[str, tuple[int, ...]]:
    """The tensors of one matrix and their sizes."""
    o1, o2 = split_size(shape.out, spec.factor)
    i1, i2 = split_size(shape.in_ // shape.taps, spec.factor)
    sizes: dict[str, tuple[int, ...]] = {}
    if spec.decompose_both and spec.rank < max(o1, i1) / 2:
        sizes |= {"C_a": (o1, spec.rank), "C_b": (spec.rank, i1)}
    else:
        sizes["C"] = (o1, i1)
    if spec.rank < max(o2, i2) / 2 and spec.tucker and shape.taps > 1:
        sizes |= {"D_t": (spec.rank, spec.rank, shape.taps), "D_u": (spec.rank, o2), "D_v": (spec.rank, i2)}
    elif spec.rank < max(o2, i2) / 2:
        sizes |= {"D_a": (o2, spec.rank), "D_b": (spec.rank, i2 * shape.taps)}
    else:
        sizes["D"] = (o2, i2 * shape.taps)
    return sizes


class LoKrDelta(Delta, of=LoKr):
    """C and D of one matrix, each whole or as a product."""

    def __init__(self, spec: LoKr, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.names = tuple(_sizes(shape, spec))
        for name, size in _sizes(shape, spec).items():
            factor = nn.Parameter(torch.zeros(size))
            if name not in ("C", "C_a"):
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            setattr(self, name, factor)
        whole = "C" in self.names and "D" in self.names
        self.scale = 1.0 if whole and spec.scale_rule == "lycoris" else spec.scale

    def _matrices(self, letter: str) -> list[Tensor]:
        """C or D as the one or two matrices whose product it is."""
        held = [getattr(self, name) for name in self.names if name.startswith(letter)]
        return held if len(held) < 3 else [tucker(*held)]

    def dense(self, W: Tensor) -> Tensor:
        C, D = (_product(self._matrices(letter)) for letter in "CD")
        return torch.kron(C * self.scale, D)

    def act(self, call: Call) -> Tensor:
        return call.through(lambda x: self._reshaped(x, call.dtype), lambda: self.dense(call.W))

    def _reshaped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`s C X Dᵀ` for x (..., in) as X (..., i1, i2)."""
        i1 = self._matrices("C")[-1].shape[1]
        h: Tensor = x.unflatten(-1, (i1, -1))
        for matrix in reversed(self._matrices("D")):
            h = F.linear(h, matrix.to(dtype))
        h = h.transpose(-1, -2)
        for index, matrix in enumerate(reversed(self._matrices("C"))):
            h = F.linear(h, (matrix if index else matrix * self.scale).to(dtype))
        y: Tensor = h.transpose(-1, -2).flatten(-2)
        return y

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        """`(C ⊗ P)(I ⊗ Q)` or `(I ⊗ P)(C ⊗ Q)` with D = P Q, whichever is thinner: rank min(o1, i1) · rank."""
        C, D = _product(self._matrices("C")) * self.scale, self._matrices("D")
        if len(D) == 1:
            thin = D[0].shape[0] <= D[0].shape[1]
            eye = torch.eye(min(D[0].shape), dtype=C.dtype, device=C.device)
            D = [eye, D[0]] if thin else [D[0], eye]
        eye = torch.eye(min(C.shape), dtype=C.dtype, device=C.device)
        if C.shape[1] <= C.shape[0]:
            return Form(B=torch.kron(C, D[0]), A=torch.kron(eye, D[1]))
        return Form(B=torch.kron(eye, D[0]), A=torch.kron(C, D[1]))

    def roles(self) -> dict[str, str]:
        return {name: "B" if name in ("C", "C_a") else "A" for name in self.names}


def _product(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
