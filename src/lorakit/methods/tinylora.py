"""TinyLoRA: a handful of trained numbers for a layer, or for many layers together.

    ΔW = B (Σ_i v_i P_i) A          A = √S_r V_rᵀ, B = U_r √S_r of W ≈ U_r S_r V_rᵀ; P_i (rank, rank) random and frozen

v (count) trains and starts at zero; neighbouring layers share one v, `tying` says how many: 0 each its own, 1 one for all. P
comes from a seed and the layer's number and is kept with the adapter, as A and B are. One number for a whole model is possible:
with reinforcement learning 13 are enough to learn something. arXiv 2602.04118.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.core.delta import Card, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import Bounded, dropout_option, rank_option


def _groups(layers: int, tying: float) -> int:
    """How many vectors a model of so many adapted layers has."""
    return max(1, round(layers * (1 - tying)))


def _used(layers: int, tying: float) -> int:
    """How many of them are in use: where layers do not divide, some have none."""
    return _group(layers - 1, layers, tying) + 1


def _group(number: int, layers: int, tying: float) -> int:
    """Which vector a layer has."""
    groups = _groups(layers, tying)
    return min(number // max(1, layers // groups), groups - 1)


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Bounded):
    """The options of TinyLoRA."""

    name = "tinylora"
    card = Card(
        title="TinyLoRA",
        formula="ΔW = B (Σ_i v_i P_i) A; B, A from W's singular triplets, P_i random",
        parameters=lambda shape, spec: 0,
        pooled=lambda shapes, spec: spec.count * _used(len(shapes), spec.tying),
        paper="arXiv 2602.04118",
        use="For reinforcement learning on a large model, where a few numbers are enough.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    rank: int = rank_option(2, "how many singular directions", pattern=None)
    count: int = option(64, "trained numbers in a vector", minimum=1, peft="u")
    tying: float = option(0.0, "share of the vectors saved: 0 each layer its own, 1 one for all", minimum=0, maximum=1,
                          peft="weight_tying")  # fmt: skip
    seed: int = option(42, "what P is drawn from, with the layer's number", peft="projection_seed")
    save_projection: bool = option(True, "keep P in the file; else the seed gives it", peft="save_projection")
    start: Literal["zero", "uniform"] = option(
        "zero",
        "where v starts: zero, or uniform within ± bound",
        peft="init_weights",
        peft_default=True,
        from_peft=lambda value: "uniform" if value == "uniform" else "zero",
        to_peft=lambda start: True if start == "zero" else start,
    )
    bound: float = option(0.02, "bound of the uniform start", above=0, peft="init_v_bound")
    dropout: float = dropout_option("tinylora_dropout")

    @property
    def identity(self) -> bool:
        return self.start == "zero"


class TinyLoRADelta(LowRank, of=TinyLoRA):
    """The frozen A, B and P of one matrix; v is the pool's. Of an embedding they are those of the table, (tokens, features)."""

    spec: TinyLoRA

    def __init__(self, spec: TinyLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        number, rank = pool.number(), spec.rank
        self.group = _group(number, max(len(pool.shapes), 1), spec.tying)
        out, in_ = (shape.in_, shape.out) if shape.lookup else (shape.out, shape.in_)
        self.register_buffer("A", torch.zeros(rank, in_))
        self.register_buffer("B", torch.zeros(out, rank))
        generator = torch.Generator().manual_seed(spec.seed + number)
        P = torch.normal(0.0, rank**-0.5, (spec.count, rank, rank), generator=generator)
        self.register_buffer("P", P, persistent=spec.save_projection)
        self.A: Tensor
        self.B: Tensor
        self.P: Tensor
        self.v()

    def v(self) -> Tensor:
        """The vector of this layer's group, (count,)."""
        spec = self.spec

        def make() -> Tensor:
            v = torch.zeros(spec.count)
            return v if spec.start == "zero" else v.uniform_(-spec.bound, spec.bound)

        return self.pool.entry(f"tinylora_v.{self.group}", make, frozen=False)

    def begin(self, W: Tensor) -> None:
        table = W.T if self.shape.lookup else W
        U, S, Vh = torch.linalg.svd(table.detach().float(), full_matrices=False)
        rank, root = self.spec.rank, S.sqrt()
        self.A.copy_((root[:, None] * Vh)[:rank])
        self.B.copy_((U * root)[:, :rank])

    def factors(self) -> tuple[Tensor, Tensor]:
        R = torch.einsum("i,ijk->jk", self.v().to(self.P), self.P)
        return ((R @ self.A).T, self.B.T) if self.shape.lookup else (self.B @ R, self.A)
