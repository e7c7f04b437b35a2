"""BOFT: OFT whose rotation is a product of sparse ones, so that few numbers reach every pair of inputs.

    y = s ⊙ ((x R) Wᵀ) + b      R = R_m … R_1, R_j = P_j blockdiag(Cayley((M_j - M_jᵀ) / 2)) P_jᵀ, M = 0 and s = 1 at start

P_j is the butterfly's order: within stretches of c · 2^(j-1) inputs, pieces of c / 2 are dealt to the even ones first and
then the odd ones. A permutation of that kind is a reshape, so no matrix of it is kept (PEFT keeps m of in × in per layer:
at 4096 inputs and m = 4 those are 268 MB). R is dense once c · 2^(m-1) >= in; with m = 1 it is OFT with output scales.

M is kept whole, m · in · c numbers of which half are redundant, because that is what PEFT's files hold; the output scale s
is PEFT's too. PEFT without its CUDA extension silently uses m = 1, whatever the configuration says; here m is m.
Liu et al. 2023, arXiv 2311.06243.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import dropout_option
from lorakit.methods.rotation import InBlocks, Rotation, blocks_option, cayley, turn_blocks, turned_size


@dataclass(frozen=True, kw_only=True)
class BOFT(InBlocks):
    """The options of BOFT."""

    name = "boft"
    card = Card(
        title="BOFT",
        formula="W' = diag(s) W Rᵀ, R = R_m … R_1, butterfly factors of block rotations",
        parameters=lambda shape, spec: spec.factors * turned_size(shape) * spec.size_of(shape) + shape.out,
        paper="arXiv 2311.06243",
        use="When OFT's blocks are too local: more of the inputs meet for the same number of parameters.",
        limits="block size · 2^(m - 1) divides the number of inputs (of an embedding's features); for m > 1 both the block "
        "size and the number of blocks are even.",
    )

    usual_size = 4

    block_size: int | None = blocks_option(
        "size of a block; 4 where neither this nor blocks is given", "boft_block_size", peft_default=4
    )
    blocks: int | None = blocks_option("number of blocks of each factor, instead of their size", "boft_block_num")
    factors: int = option(2, "number of butterfly factors", minimum=1, peft="boft_n_butterfly_factor", peft_default=1)
    dropout: float = dropout_option("boft_dropout", "share of blocks that are the identity in a training step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors > 1 and self.block_size is not None and self.block_size % 2:
            raise LorakitError(
                f"boft: block_size={self.block_size} is odd, and butterfly factors deal half blocks; take "
                f"{self.block_size + 1}, or factors=1."
            )

    def size_of(self, shape: Shape) -> int:
        """The block size c on a matrix of this shape."""
        return turned_size(shape) // self.blocks if self.blocks else self.unit

    def check(self, shape: Shape, path: str) -> None:
        super().check(shape, path)
        size, c = turned_size(shape), self.size_of(shape)
        if self.blocks and self.factors > 1 and c % 2:
            raise LorakitError(
                f"attach: boft with blocks={self.blocks} gives {path} ({size} features) blocks of the odd size {c}; "
                "butterfly factors need even ones, or factors=1."
            )
        reach = c * 2 ** (self.factors - 1)
        if size % reach:
            fitting = [m for m in range(1, self.factors) if size % (c * 2 ** (m - 1)) == 0]
            raise LorakitError(
                f"attach: boft with factors={self.factors} deals {reach} features at once on {path}, which do not divide its "
                f"{size}. Here factors={fitting[-1]} works, or smaller blocks."
            )


class BOFTDelta(Rotation, of=BOFT):
    """M (m, blocks, c, c) and the output scales s (out,) of one matrix."""

    def __init__(self, spec: BOFT, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        c = spec.size_of(shape)
        self.M = nn.Parameter(torch.zeros(spec.factors, self.size // c, c, c))
        self.s = nn.Parameter(torch.ones(shape.out))

    def turns(self) -> Tensor:
        """R_j - I before its reordering, (m, blocks, c, c)."""
        Q = (self.M - self.M.mT) / 2
        # As in PEFT this is Cayley of -Q: the sign of a trained skew matrix is a convention, the file's is this.
        return self.thin(cayley(-Q).flatten(0, 1)).view_as(Q)

    def change(self, x: Tensor, back: bool = False) -> Tensor:
        turns = self.turns()
        change: Tensor | None = None
        orders = range(len(turns))
        for order in orders if back else reversed(orders):
            K = turns[order].mT if back else turns[order]
            step = self._deal(x if change is None else x + change, K, order)
            change = step if change is None else change + step
        assert change is not None
        return change

    def _deal(self, x: Tensor, K: Tensor, order: int) -> Tensor:
        """`x P blockdiag(K) Pᵀ` for the butterfly of this order; the first leaves the inputs where they are."""
        if order == 0:
            return turn_blocks(x, K)
        pieces, half = 2**order, K.shape[-1] // 2
        dealt: Tensor = x.unflatten(-1, (-1, 2, pieces, half)).transpose(-3, -2).reshape(x.shape)
        turned = turn_blocks(dealt, K)
        back: Tensor = turned.unflatten(-1, (-1, pieces, 2, half)).transpose(-3, -2).reshape(x.shape)
        return back

    def gain(self) -> Tensor:
        return self.s
