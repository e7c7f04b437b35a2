"""OFT: the inputs of a layer are turned by a block-diagonal rotation; nothing is added and no length changes.

    y = (x R) Wᵀ + b      R = blockdiag(R_1 … R_k), R_j = (I + Q_j)(I - Q_j)⁻¹, Q_j (c, c) skew, k c = in, Q starts at zero

Trained are the strict upper triangles: in · (c - 1) / 2 numbers, with a shared block c · (c - 1) / 2. A 576 → 1536 layer
in blocks of 32 trains 18 · 496 = 8928 numbers. More blocks are fewer numbers.

Cayley-Neumann (PEFT's default) replaces the inverse by the first terms of its series, I + 2Q + 2Q² + 2Q³ + Q⁴: cheap, but
only nearly orthogonal; the error grows like ‖Q‖⁵. COFT keeps every block within a ball: ‖Q‖ <= eps (eps / √k for k
blocks); here Q is scaled back within the formula, not overwritten in each forward as elsewhere.

The sign of Q: PEFT's exact branch computes (I - Q)(I + Q)⁻¹, the inverse of what its series branch approximates, so a file
means one rotation or its inverse by a flag. Here both are the same function of Q, and the exact form reads its triangle
with the other sign, so that PEFT's files act in lorakit as they do in PEFT.
Qiu et al. 2023, arXiv 2306.07280; OFTv2 (input-side): arXiv 2506.19847.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import divisors, dropout_option
from lorakit.methods.rotation import (
    InBlocks,
    Rotation,
    blocks_option,
    cayley,
    series,
    skew,
    turn_blocks,
    turned_size,
    within,
)


@dataclass(frozen=True, kw_only=True)
class OFT(InBlocks):
    """The options of OFT."""

    name = "oft"
    card = Card(
        title="OFT",
        formula="W' = W Rᵀ, R = blockdiag((I + Q)(I - Q)⁻¹), Q skew",
        parameters=lambda shape, spec: math.prod(_size(shape, spec)),
        paper="arXiv 2306.07280; OFTv2 arXiv 2506.19847",
        use="When the base's knowledge must stay: angles between neurons do not change.",
        limits="The block size divides the number of inputs (of an embedding's features).",
    )

    usual_size = 32

    block_size: int | None = blocks_option(
        "size of a block; 32 where neither this nor blocks is given", "oft_block_size"
    )
    blocks: int | None = blocks_option("number of blocks, instead of their size", "r")
    exact: bool = option(
        False,
        "the exact Cayley transform instead of its series",
        peft="use_cayley_neumann",
        peft_default=False,
        from_peft=operator.not_,
        to_peft=operator.not_,
    )
    terms: int = option(
        5, "terms of the series", minimum=4, peft="num_cayley_neumann_terms", from_peft=lambda terms: max(terms, 4)
    )
    coft: bool = option(False, "keep every block within eps of the identity", peft="coft")
    eps: float = option(6e-5, "how far from the identity a block may be with coft", above=0, peft="eps")
    block_share: bool = option(False, "one block for all", peft="block_share")
    dropout: float = dropout_option("module_dropout", "share of blocks that are the identity in a training step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size == 1:
            raise LorakitError("oft: a block of size 1 has nothing to turn; block_size is at least 2.")

    def check(self, shape: Shape, path: str) -> None:
        super().check(shape, path)
        size = turned_size(shape)
        if self.blocks and size // self.blocks < 2:
            raise LorakitError(
                f"attach: oft with blocks={self.blocks} gives {path} ({size} features) blocks of size {size // self.blocks}, "
                f"which have nothing to turn; at most {size // 2} blocks do."
            )


def _size(shape: Shape, spec: OFT) -> tuple[int, int]:
    """Rows and columns of Q's triangles. A size that does not divide (a file of PEFT's, which takes the nearest that
    does) becomes the nearest that does; `check` refuses it for a new adapter."""
    size = turned_size(shape)
    unit = min(divisors(size), key=lambda number: (abs(number - spec.unit), number))
    c, k = (size // unit, unit) if spec.blocks else (unit, size // unit)
    return (1 if spec.block_share else k), c * (c - 1) // 2


class OFTDelta(Rotation, of=OFT):
    """Q (k, c (c - 1) / 2) of one matrix: the strict upper triangles, row by row."""

    def __init__(self, spec: OFT, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        k, numbers = _size(shape, spec)
        self.c = (1 + math.isqrt(1 + 8 * numbers)) // 2
        self.exact, self.terms = spec.exact, spec.terms
        self.eps = spec.eps / math.sqrt(k) if spec.coft else None
        self.Q = nn.Parameter(torch.zeros(k, numbers))

    def skew(self) -> Tensor:
        """Q as skew matrices, (k, c, c), within COFT's ball."""
        return skew(within(self.Q, self.eps), self.c)

    def turns(self) -> Tensor:
        """R - I, (k, c, c)."""
        Q = self.skew()
        return cayley(-Q) if self.exact else series(Q, self.terms)

    def change(self, x: Tensor, back: bool = False) -> Tensor:
        K = self.thin(self.turns())
        return turn_blocks(x, K.mT if back else K)
