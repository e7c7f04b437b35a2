"""LoReFT: hidden states are edited between blocks, in a small subspace and at a few tokens of the prompt.

    h ← h + Rᵀ (W h + b - R h)        R (rank, hidden) with orthonormal rows, W (rank, hidden), b (rank,)

at the first and the last tokens of the prompt, after each block. W starts as R and b at zero, so that the model begins as
its base; the authors' code starts W at random (start="random"). R is made orthonormal from a free matrix at each call. What
a prompt is: what comes before the cache holds anything, what training does not learn, or what `lk.prompts` says. 30 blocks
of width 576 at rank 4 train 138,360 numbers. Wu et al. 2024, arXiv 2404.03592.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.edits.contract import Anatomy, Change, EditMethod, Place, in_blocks
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class LoReFT(EditMethod):
    """The options of LoReFT."""

    name = "loreft"
    reason = "it edits hidden states of a few tokens, and a weight acts on all of them"
    needs_padding = "it edits chosen tokens of each prompt, and shared prefixes are computed once"
    card = Card(
        title="ReFT (LoReFT)",
        formula="h + Rᵀ (W h + b - R h)",
        parameters=lambda anatomy, spec: len(anatomy.blocks) * spec.rank * (2 * anatomy.hidden + 1),
        paper="arXiv 2404.03592",
        use="Very few numbers, no cost per generated token: only the prompt is edited.",
        limits="Acts on prompts only; training must know where answers begin.",
    )

    rank: int = option(4, "dimensions of the subspace", minimum=1)
    first: int = option(1, "how many of the prompt's first tokens are edited", minimum=0)
    last: int = option(1, "how many of the prompt's last tokens are edited", minimum=0)
    start: Literal["identity", "random"] = option(
        "identity", "identity starts as the base; random is the authors' code"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first + self.last == 0:
            raise LorakitError(f"{self.name}: first and last are both 0, which edits no token.")

    def places(self, anatomy: Anatomy, layers: Sequence[int] | None) -> list[Place]:
        return [Place(block.path) for block in in_blocks(anatomy.blocks, layers, self.name)]

    def build(self, place: Place, anatomy: Anatomy, folded: bool = False) -> SubspaceEdit:
        if self.rank > anatomy.hidden:
            raise LorakitError(
                f"attach: {self.name} has rank {self.rank}, and hidden states of this model have {anatomy.hidden} numbers."
            )
        return SubspaceEdit(self, place, anatomy.hidden)


class SubspaceEdit(Change):
    """R (rank, hidden), a free matrix whose rows are made orthonormal; W (rank, hidden); b (rank,)."""

    chosen = True

    def __init__(self, spec: LoReFT, place: Place, hidden: int) -> None:
        super().__init__(spec, place)
        self.first, self.last = spec.first, spec.last
        self.R = nn.Parameter(nn.init.orthogonal_(torch.empty(spec.rank, hidden)))
        self.W = nn.Parameter(self.rotation().detach().clone())
        self.b = nn.Parameter(torch.zeros(spec.rank))
        if spec.start == "random":
            nn.init.uniform_(self.W, -(hidden**-0.5), hidden**-0.5)

    def rotation(self) -> Tensor:
        """R with orthonormal rows."""
        wide = self.R.to(torch.promote_types(self.R.dtype, torch.float32))
        Q, upper = torch.linalg.qr(wide.T)
        return cast(Tensor, (Q * upper.diagonal().sign()).T)  # signs chosen so that an orthonormal R is itself

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        R = self.rotation()
        # as a difference of matrices: exactly zero while W is R
        return F.linear(y, (self.W - R).to(y.dtype), self.b.to(y.dtype)) @ R.to(y.dtype)

    def select(self, prompt: Tensor) -> Tensor:
        place, count = prompt.cumsum(1), prompt.sum(1, keepdim=True)
        return prompt & ((place <= self.first) | (place > count - self.last))
