"""LoRA-XS: the weight's own leading singular directions, frozen, and a small trained matrix between them.

    ΔW = s B R A          W ≈ U S Vᵀ, B = U_r (out, rank), A = S_r V_rᵀ (rank, in), R (rank, rank) trained, s = alpha / rank

R starts at N(0, 1e-5²), which changes the model by about 1e-5; `start=0` makes the start exact, and R still trains, since
neither A nor B is zero. The singular values are on the input side alone: putting √S on both sides is another method.
A and B are saved with the adapter, so that no decomposition has to be repeated bit for bit elsewhere. Learning rates are
well above LoRA's (1e-3 to 4e-3). Bałazy et al. 2024, arXiv 2405.17604.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class LoRAXS(Method):
    """The options of LoRA-XS.

    Attributes:
        rank: how many singular directions; R is (rank, rank).
        alpha: the scale's numerator; the scale is alpha / rank.
        dropout: probability with which an input of A is zeroed while training.
        start: standard deviation of R at the start.
        iterations: power iterations of a randomised decomposition, as in the paper's code; None decomposes exactly, which
            takes minutes for a large model.
    """

    name: ClassVar[str] = "lora-xs"
    peft_suffix: ClassVar[str] = r"\.loraxs_"
    pattern_fields: ClassVar[dict[str, str]] = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
    card: ClassVar[Card] = Card(
        title="LoRA-XS",
        formula="ΔW = s B R A; B, A the leading singular directions of W, frozen",
        parameters=lambda shape, spec: spec.rank**2,
        paper="arXiv 2405.17604",
        use="When the number of trained values must not depend on the model's width.",
        limits="the rank is at most the smaller side of the matrix",
        identity=False,
    )

    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0
    start: float = 1e-5
    iterations: int | None = 10

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise LorakitError(f"lora-xs: rank was given as {self.rank!r}; it is an integer of at least 1.")
        if not math.isfinite(self.alpha):
            raise LorakitError(f"lora-xs: alpha was given as {self.alpha!r}; it is a finite number.")
        if not 0.0 <= self.dropout < 1.0:
            raise LorakitError(f"lora-xs: dropout was given as {self.dropout!r}; it is at least 0 and below 1.")
        if not 0.0 <= self.start < math.inf:
            raise LorakitError(f"lora-xs: start was given as {self.start!r}; it is a standard deviation, 0 or more.")
        if self.iterations is not None and self.iterations < 0:
            raise LorakitError(f"lora-xs: iterations was given as {self.iterations!r}; it is 0 or more, or None.")

    def check(self, shape: Shape, path: str) -> None:
        most = min(shape.out, shape.in_)
        if self.rank > most:
            raise LorakitError(
                f"attach: rank {self.rank} is above the size of {path} ({shape.out} × {shape.in_}), which has {most} singular "
                f"directions. Give it less by rank_pattern={{{path!r}: {most}}}, or leave the layer out."
            )

    def build(self, shape: Shape, pool: Pool) -> LoRAXSDelta:
        return LoRAXSDelta(self, shape, pool)

    def peft_config(self) -> dict[str, Any]:
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}


class LoRAXSDelta(LowRank):
    """R of one matrix, and the frozen A and B, which are known once the weight is."""

    spec: LoRAXS

    def __init__(self, spec: LoRAXS, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale, self.dropout = spec.alpha / spec.rank, spec.dropout
        self.R = nn.Parameter(torch.randn(spec.rank, spec.rank) * spec.start)
        self.register_buffer("A", torch.zeros(spec.rank, shape.in_))
        self.register_buffer("B", torch.zeros(shape.out, spec.rank))
        self.A: Tensor
        self.B: Tensor

    def begin(self, W: Tensor) -> None:
        rank, W = self.spec.rank, W.detach().to(self.A.dtype)
        if self.spec.iterations is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, q=min(rank + 10, *W.shape), niter=self.spec.iterations)
            Vh = V.T
        self.B.copy_(U[:, :rank])
        self.A.copy_(S[:rank, None] * Vh[:rank])

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B @ self.R, self.A

    def peft_keys(self, kind: str) -> dict[str, tuple[str, str]]:
        return {"R": ("loraxs_R", ""), "A": ("loraxs_A", ""), "B": ("loraxs_B", "")}
