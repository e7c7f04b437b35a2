"""MiSS: inputs are summed in groups, and one small trained matrix acts on the sums. Its earlier name is Bone.

    "plain"   ΔW[o, j] = D[j mod rank, o]             D (rank, out): LoRA with B = Dᵀ and a fixed A of zeros and ones
    "mini"    the same with D repeated over outputs   D (rank, mini), output o reads column o mod mini
    "bat"     W_pq ← W_pq + W_pq D_p + D_p            D (out / rank, rank, rank), blocks of rank × rank, p the output's block

D starts at zero. Without an A to train a step costs less than LoRA's, for rank · out numbers; "bat" sees the weight itself.
Kang and Yin 2024, arXiv 2409.15371.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, LowRank, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import check_divides_sides, dropout_option, rank_option


def _size(shape: Shape, spec: MiSS) -> tuple[int, ...]:
    """The sizes of D on a matrix of this shape."""
    rank = spec.rank
    if spec.kind == "bat":
        return shape.out // rank, rank, rank
    return rank, spec.mini if spec.kind == "mini" else shape.out


@dataclass(frozen=True, kw_only=True)
class MiSS(Method):
    """The options of MiSS."""

    name = "miss"
    card = Card(
        title="MiSS",
        formula="ΔW[o, j] = D[j mod rank, o]; bat: W_pq ← W_pq + W_pq D_p + D_p",
        parameters=lambda shape, spec: torch.Size(_size(shape, spec)).numel(),
        paper="arXiv 2409.15371",
        use="When training must be cheap: half of LoRA's numbers at a rank, and no A.",
        limits="The rank is at most the number of inputs; for bat it divides both sides, for mini `mini` divides the outputs.",
    )

    rank: int = rank_option(64, "how many sums the inputs make", pattern=None)
    kind: Literal["plain", "mini", "bat"] = option(
        "plain",
        "plain; mini, with columns of D that outputs share; or bat, with blocks that see the weight",
        peft="init_weights",
        peft_default=True,
        from_peft=lambda value: value if value in ("mini", "bat") else "plain",
        to_peft=lambda kind: True if kind == "plain" else kind,
    )
    mini: int = option(1, "columns of D where it is mini", minimum=1, peft="mini_r")
    dropout: float = dropout_option(
        "miss_dropout", "probability with which an input is zeroed in training; not for bat"
    )

    def check(self, shape: Shape, path: str) -> None:
        if self.kind == "bat":
            check_divides_sides("rank", self.rank, shape, path)
        if self.kind == "mini" and shape.out % self.mini:
            raise LorakitError(f"attach: mini {self.mini} does not divide the {shape.out} outputs of {path}.")
        if self.rank > shape.in_:
            raise LorakitError(f"attach: rank {self.rank} is above the {shape.in_} inputs of {path}.")

    def build(self, shape: Shape, pool: Pool) -> Delta:
        return (Blocks if self.kind == "bat" else Sums)(self, shape, pool)


class Sums(LowRank):
    """D, and which input belongs to which sum."""

    def __init__(self, spec: MiSS, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.D = nn.Parameter(torch.zeros(_size(shape, spec)))
        sums = torch.arange(shape.in_) % spec.rank == torch.arange(spec.rank)[:, None]
        self.register_buffer("A", sums.float(), persistent=False)
        self.A: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.D.repeat(1, self.shape.out // self.D.shape[1]).T, self.A


class Blocks(Delta):
    """D of every block of outputs."""

    def __init__(self, spec: MiSS, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.D = nn.Parameter(torch.zeros(_size(shape, spec)))

    def dense(self, W: Tensor) -> Tensor:
        rank = self.D.shape[-1]
        W = W.to(torch.promote_types(W.dtype, self.D.dtype))
        blocks = W.unflatten(1, (-1, rank)).unflatten(0, (-1, rank)).transpose(1, 2)
        change: Tensor = blocks @ self.D[:, None] + self.D[:, None]
        return change.transpose(1, 2).reshape(W.shape)
