"""BD-LoRA: LoRA one of whose factors is block-diagonal, so that a server that shards the layer need not exchange anything.

    ΔW = s B A          A = diag(A_1 … A_n) (rank, in), or B = diag(B_1 … B_n) (out, rank), of n blocks

A block sees its own share of the inputs, or gives its own share of the outputs. Layers whose weight is sharded by rows have
A so (o_proj, down_proj), those sharded by columns have B so (q, k, v, gate, up). Only the blocks are trained and stored: at
rank 16 with 4 blocks of A a 576 → 1536 layer trains 16 · (576 / 4 + 1536) = 26,880 numbers.
PEFT's form (use_bdlora).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.lora import LoRAOptions


@dataclass(frozen=True, kw_only=True)
class BDLoRA(LoRAOptions):
    """The options of BD-LoRA."""

    name = "bd-lora"
    card = Card(
        title="BD-LoRA",
        formula="ΔW = s B A, A or B block-diagonal",
        parameters=lambda shape, spec: sum(map(math.prod, _sizes(shape, spec))),
        paper="-",
        use="When many adapters are to be served on a model that is sharded over devices.",
        limits="The number of blocks divides the rank, and the inputs (A) or the outputs (B).",
    )

    blocks: int = option(2, "blocks of the block-diagonal factor: over how many devices the server shards", minimum=1)
    a_modules: tuple[str, ...] = option((), "layers whose A has blocks: a part of the layer's own name")
    b_modules: tuple[str, ...] = option((), "layers whose B has blocks: a part of the layer's own name")
    strict: bool = option(True, "refuse a layer that neither names; otherwise it gets a plain LoRA")
    side: Literal["", "A", "B"] = option("", "which factor has blocks, in layers that neither names")

    def __post_init__(self) -> None:
        for name in ("a_modules", "b_modules"):
            given: Any = getattr(self, name)
            if not isinstance(given, str):
                object.__setattr__(self, name, tuple(given))
        super().__post_init__()

    def at(self, path: str) -> Method:
        own = path.rpartition(".")[2]
        sides = [
            side for side, names in (("A", self.a_modules), ("B", self.b_modules)) if any(one in own for one in names)
        ]
        if len(sides) == 2:
            raise LorakitError(f"bd-lora: {path} is named by a_modules and by b_modules; one factor can have blocks.")
        return self.replace(side=sides[0]) if sides else self

    def check(self, shape: Shape, path: str) -> None:
        super().check(shape, path)
        if not self.side and self.strict:
            raise LorakitError(
                f"attach: bd-lora was told neither by a_modules nor by b_modules which factor of {path} has blocks. Name it, "
                "or set strict=False, which gives it a plain LoRA."
            )
        size, what = (shape.in_, "inputs") if self.side == "A" else (shape.out, "outputs")
        for number, of in ((self.rank, "rank"), (size, what)):
            if self.side and number % self.blocks:
                raise LorakitError(f"attach: {path} has {of} {number}, which {self.blocks} blocks do not divide.")


def _sizes(shape: Shape, spec: BDLoRA) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of B and of A as they are kept."""
    rank_of_B = spec.rank // spec.blocks if spec.side == "B" else spec.rank
    return (shape.out, rank_of_B), (spec.rank, shape.in_ // spec.blocks if spec.side == "A" else shape.in_)


class BDLoRADelta(LowRank, of=BDLoRA):
    """A and B of one matrix; of a block-diagonal one the blocks, one upon the other."""

    spec: BDLoRA

    def __init__(self, spec: BDLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        B, A = _sizes(shape, spec)
        bound = 1 / math.sqrt(A[1])
        zero, drawn = torch.zeros, lambda *size: torch.empty(*size).uniform_(-bound, bound)
        self.A = nn.Parameter((zero if shape.lookup else drawn)(*A))
        self.B = nn.Parameter((drawn if shape.lookup else zero)(*B))

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = (
            torch.block_diag(*kept.chunk(self.spec.blocks)) if self.spec.side == letter else kept
            for letter, kept in (("B", self.B), ("A", self.A))
        )
        return B, A

    def roles(self) -> dict[str, str]:
        return {"A": "B", "B": "A"} if self.shape.lookup else {}
