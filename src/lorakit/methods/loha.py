"""LoHa: the elementwise product of two low-rank matrices, whose rank is up to the square of theirs.

    ΔW = s (B1 A1) ⊙ (B2 A2)          B* (out, rank), A* (rank, in), s = alpha / rank, A2 starts at zero

The product is itself a low-rank product: its factors are the row-wise and column-wise Khatri-Rao products of the B's and
of the A's, of rank rank², exactly. Where rank² is small against the matrix (4 → 16, 8 → 64) it acts through them, like
LoRA, and the matrix is never made. Elsewhere ΔW is made, and the backward makes `B1 A1` and `B2 A2` again rather than
keep two matrices as large as W. A 576 → 1536 layer at rank 8 trains 2 · 8 · (576 + 1536) = 33,792 numbers.

LyCORIS draws its factors from N(0, 1), which at a scale of alpha / rank explodes for small ranks; here, as in PEFT and
FedPara, they are Kaiming-uniform. With `tucker` (PEFT's use_effective_conv2d) each product of a convolution with a kernel
is a Tucker decomposition: a core (rank, rank, kernel) between U (rank, out) and V (rank, channels).
Hyeon-Woo et al. 2021, arXiv 2108.06098; Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lorakit.core.delta import Card, Delta, LowRank, Pool, Shape
from lorakit.errors import LorakitError
from lorakit.methods.options import Scaled, alpha_option, is_lenient, rank_option, tucker, tucker_option


@dataclass(frozen=True, kw_only=True)
class LoHa(Scaled):
    """The options of LoHa."""

    name = "loha"
    card = Card(
        title="LoHa",
        formula="ΔW = s (B1 A1) ⊙ (B2 A2), s = alpha / rank",
        parameters=lambda shape, spec: 2 * sum(map(math.prod, _sizes(shape, spec).values())),
        paper="arXiv 2108.06098; 2309.14859",
        use="When a change of higher rank is wanted for the same number of parameters; common for diffusion models.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    rank: int = rank_option(8, "rank of each of the two products; that of ΔW is up to rank²")
    alpha: float = alpha_option(8.0, peft="alpha")
    tucker: bool = tucker_option()

    def check(self, shape: Shape, path: str) -> None:
        smaller = min(shape.out, shape.in_)
        if self.rank > smaller and not is_lenient():
            raise LorakitError(
                f"attach: rank {self.rank} is above the size of {path} ({shape.out} × {shape.in_}). Rank "
                f"{math.isqrt(smaller - 1) + 1} makes ΔW of full rank already; {smaller} is the most that is allowed."
            )

    def build(self, shape: Shape, pool: Pool) -> Delta:
        if "T" in _sizes(shape, self):
            return TuckerLoHaDelta(self, shape, pool)
        thin = self.rank**2 * (shape.out + shape.in_) < shape.out * shape.in_
        return (LoHaDelta if thin else WideLoHaDelta)(self, shape, pool)


def _sizes(shape: Shape, spec: LoHa) -> dict[str, tuple[int, ...]]:
    """The tensors of each of the two products and their sizes."""
    rank = spec.rank
    if spec.tucker and shape.taps > 1:
        return {"T": (rank, rank, shape.taps), "U": (rank, shape.out), "V": (rank, shape.in_ // shape.taps)}
    return {"B": (shape.out, rank), "A": (rank, shape.in_)}


class TuckerLoHaDelta(Delta):
    """T, U and V of both products, of which V2 starts at zero."""

    def __init__(self, spec: LoHa, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        for name, size in _sizes(shape, spec).items():
            for side in "12":
                factor = nn.Parameter(torch.zeros(size))
                if name + side != "V2":
                    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
                setattr(self, name + side, factor)

    def dense(self, W: Tensor) -> Tensor:
        first, second = (tucker(*(getattr(self, name + side) for name in "TUV")) for side in "12")
        return self.scale * first * second

    def roles(self) -> dict[str, str]:
        return {name + side: "B" if name + side == "V2" else "A" for name in "TUV" for side in "12"}


class LoHaDelta(LowRank):
    """B1, A1, B2, A2 of one matrix, acting through their Khatri-Rao factors."""

    def __init__(self, spec: LoHa, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        self.B1 = nn.Parameter(torch.empty(shape.out, spec.rank))
        self.A1 = nn.Parameter(torch.empty(spec.rank, shape.in_))
        self.B2 = nn.Parameter(torch.empty(shape.out, spec.rank))
        self.A2 = nn.Parameter(torch.zeros(spec.rank, shape.in_))
        for factor in (self.B1, self.A1, self.B2):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        B = (self.B1[:, :, None] * self.B2[:, None, :]).flatten(1)
        A = (self.A1[:, None, :] * self.A2[None, :, :]).flatten(0, 1)
        return B, A

    def dense(self, W: Tensor) -> Tensor:
        product: Tensor = _Hadamard.apply(self.B1, self.A1, self.B2, self.A2, self.scale)  # type: ignore[no-untyped-call]
        return product

    def roles(self) -> dict[str, str]:
        return {"B1": "A", "A1": "A", "B2": "A", "A2": "B"}  # "B" is the one that starts at zero


class WideLoHaDelta(LoHaDelta):
    """The same where rank² is too large for the Khatri-Rao factors to be thin: ΔW is made and used."""

    act = Delta.act
    output = Delta.output


class _Hadamard(Function):
    """`scale (B1 A1) ⊙ (B2 A2)`, keeping the four factors and no product for the backward."""

    @staticmethod
    def forward(ctx: Any, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(B1, A1, B2, A2)
        ctx.scale = scale
        return (B1 @ A1).mul_(B2 @ A2).mul_(scale)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        B1, A1, B2, A2 = ctx.saved_tensors
        d = d * ctx.scale
        first = d * (B2 @ A2)
        dB1, dA1 = first @ A1.T, B1.T @ first
        del first
        second = d * (B1 @ A1)
        return dB1, dA1, second @ A2.T, B2.T @ second, None
