"""VB-LoRA: LoRA's factors put together from one bank of short vectors that all layers share.

    A, B cut into pieces of `vector_length` b; each piece = Σ softmax(its topk largest logits) · (those vectors of the bank)
    ΔW = B A          bank (h, b) shared, logits_A (rank, in/b, h), logits_B (out/b, rank, h); pieces of B run along `out`

Bank U(±0.02) and logits N(0, 0.1²): the start is not zero but small, about 1e-4 of W. Only the selected logits get gradients.
Trained are all logits, far more numbers than the paper's stored ones (topk indices and topk - 1 weights per piece). lorakit
writes the logits; files that hold the selection alone (PEFT's save_only_topk_weights) are read exactly, and since the logits
that lost are gone from them, their logits no longer train. Give the bank a lower learning rate (1e-3) than the logits (1e-2).
Li et al. 2024, arXiv 2405.15179.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import check_divides_sides, dropout_option, rank_option


@dataclass(frozen=True, kw_only=True)
class VBLoRA(Method):
    """The options of VB-LoRA."""

    name = "vb-lora"
    card = Card(
        title="VB-LoRA",
        formula="ΔW = B A; pieces of A and B are top-k mixtures of a shared bank of vectors",
        parameters=lambda shape, spec: (
            0 if spec.fixed_selection else spec.num_vectors * spec.rank * (shape.out + shape.in_) // spec.vector_length
        ),
        pooled=lambda shapes, spec: spec.num_vectors * spec.vector_length,
        paper="arXiv 2405.15179",
        use="When the stored adapter must be tiny; training needs more numbers than LoRA.",
        limits="vector_length divides both sides of every matrix",
        identity=False,
    )

    rank: int = rank_option(4, pattern=None)
    num_vectors: int = option(256, "vectors in the shared bank", minimum=1, peft="num_vectors")
    vector_length: int = option(
        256, "numbers in each vector; divides both sides of every adapted matrix", minimum=1, peft="vector_length"
    )
    topk: int = option(2, "vectors of the bank that make one piece", minimum=1, peft="topk")
    dropout: float = dropout_option("vblora_dropout")
    bank_bound: float = option(0.02, "the bank starts uniform within ± this", above=0, peft="init_vector_bank_bound")
    logits_std: float = option(0.1, "standard deviation of the logits at the start", above=0, peft="init_logits_std")
    fixed_selection: bool = option(
        False,
        "keep the logits as they are: they came from a file of the selected ones alone",
        peft="save_only_topk_weights",
        to_peft=lambda value: False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise LorakitError(
                f"vb-lora: topk {self.topk} of num_vectors {self.num_vectors} cannot be selected; topk is at most num_vectors."
            )

    def check(self, shape: Shape, path: str) -> None:
        check_divides_sides("vector_length", self.vector_length, shape, path)


class VBLoRADelta(LowRank, of=VBLoRA):
    """The logits of one matrix; the bank is the pool's."""

    spec: VBLoRA

    def __init__(self, spec: VBLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        b, h = spec.vector_length, spec.num_vectors
        self.logits_A = nn.Parameter(torch.randn(spec.rank, shape.in_ // b, h) * spec.logits_std)
        self.logits_B = nn.Parameter(torch.randn(shape.out // b, spec.rank, h) * spec.logits_std)
        self.bank()

    def bank(self) -> Tensor:
        """The shared vectors, (h, b)."""
        spec = self.spec

        def make() -> Tensor:
            return torch.empty(spec.num_vectors, spec.vector_length).uniform_(-spec.bank_bound, spec.bank_bound)

        return self.pool.entry("vblora_vector_bank", make, frozen=False)

    def pieces(self, logits: Tensor) -> Tensor:
        """(..., h) -> (..., b): the weighted vectors that the logits select."""
        top, indices = logits.topk(self.spec.topk, dim=-1)
        return (top.softmax(-1)[..., None] * self.bank().to(logits)[indices]).sum(-2)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self.pieces(self.logits_A).flatten(1)
        B = self.pieces(self.logits_B).transpose(1, 2).flatten(0, 1)
        return B, A

    def frozen(self) -> list[nn.Parameter]:
        return [self.logits_A, self.logits_B] if self.spec.fixed_selection else []
