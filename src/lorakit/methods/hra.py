"""HRA: the inputs of a layer are reflected several times in a row, each time in a trained direction.

    W' = W H_1 … H_rank          H_i = I - 2 u_i u_iᵀ / ‖u_i‖², U = [u_1 … u_rank] (in, rank)

A product of reflections is I - U T Uᵀ with a triangular T (rank, rank), T⁻¹ = I / 2 + the strict upper triangle of UᵀU for
columns of length 1: so it costs three thin products and no matrix of in × in. Columns start in equal pairs, whose reflections
cancel. An odd rank cannot start as the base. `orthogonal` makes the columns orthonormal first, W' = W (I - 2 Q Qᵀ), which never
is the base. Yuan, Liu and Xu 2024, arXiv 2405.17484.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import rank_option
from lorakit.methods.rotation import Rotation, turned_size


@dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """The options of HRA."""

    name = "hra"
    card = Card(
        title="HRA",
        formula="W' = W H_1 … H_rank, H_i = I - 2 u_i u_iᵀ / ‖u_i‖²",
        parameters=lambda shape, spec: spec.rank * turned_size(shape),
        paper="arXiv 2405.17484",
        use="When the base's knowledge must stay, as with OFT, at the numbers of a LoRA without B.",
        limits="The rank is at most the number of inputs (of an embedding's features).",
    )

    rank: int = rank_option(8, "how many reflections; even, to start as the base", pattern=None)
    orthogonal: bool = option(False, "make the directions orthonormal before they reflect", peft="apply_GS")

    @property
    def identity(self) -> bool:
        return self.rank % 2 == 0 and not self.orthogonal

    def check(self, shape: Shape, path: str) -> None:
        if self.rank > turned_size(shape):
            raise LorakitError(
                f"attach: hra with rank {self.rank} has more directions than the {turned_size(shape)} features of {path} "
                "that it reflects; give that many or less, or leave the layer out."
            )


class HRADelta(Rotation, of=HRA):
    """U of one matrix."""

    spec: HRA

    def __init__(self, spec: HRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        pairs = spec.identity
        columns = spec.rank // 2 if pairs else spec.rank
        u = torch.empty(self.size, columns).uniform_(-1, 1) / math.sqrt(columns)
        self.u = nn.Parameter(u.repeat_interleave(2, dim=1) if pairs else u)

    def change(self, x: Tensor, back: bool = False) -> Tensor:
        eye = torch.eye(self.u.shape[1], dtype=self.u.dtype, device=self.u.device)
        if self.spec.orthogonal:
            U = torch.linalg.qr(self.u).Q
            T = 2 * eye
        else:
            U = self.u / torch.linalg.vector_norm(self.u, dim=0)
            T = torch.linalg.solve_triangular(eye / 2 + (U.T @ U).triu(1), eye, upper=True)
        # R = (H_1 … H_rank)ᵀ turns the inputs, since W' = W Rᵀ
        left = U @ (T if back else T.T)
        change: Tensor = -(x @ left.to(x.dtype)) @ U.T.to(x.dtype)
        return change
