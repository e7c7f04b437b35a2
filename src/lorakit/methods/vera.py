"""VeRA: one frozen random pair of factors for the whole model, and two trained vectors per matrix.

    ΔW = diag(λ_b) B diag(λ_d) A          A (rank, widest in), B (widest out, rank), each layer uses the slice that fits it

λ_b (out) starts at zero, λ_d (rank) at 0.1; nothing else trains. The pair belongs to the adapter: it is drawn once from a
seed on the CPU and saved with the adapter, unless `save_projection` is off and the seed has to bring it back. A rank above
the width of a layer is meant: the paper has 1024 for a width of 768. Use learning rates near 1e-2.

Not advisable on embeddings: the pair grows as wide as the vocabulary, and one token meets one tiny column of A.
Kopiczko et al. 2023, arXiv 2310.11454.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import dropout_option, rank_option


@dataclass(frozen=True, kw_only=True)
class RandomPair(Method):
    """The options of a frozen pair that all layers share."""

    seed: int = option(
        0, "what the shared pair is drawn from", peft="projection_prng_key", from_peft=lambda seed: seed or 0
    )
    save_projection: bool = option(
        True,
        "keep the shared pair in the file; without it the seed must reproduce it elsewhere",
        peft="save_projection",
    )


class OverPair(LowRank):
    """A delta over a frozen random pair of the pool; a member writes `draw`."""

    spec: RandomPair

    @abstractmethod
    def draw(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """`(B, A)` from the seed, for the longest sides that any layer has."""

    def projections(self) -> tuple[Tensor, Tensor]:
        """The shared `(B, A)`, drawn on first use."""
        spec, shapes = self.spec, self.pool.shapes or [self.shape]
        draw = functools.cache(lambda: self.draw(max(s.out for s in shapes), max(s.in_ for s in shapes)))
        B, A = (
            self.pool.entry(f"{spec.name}_{letter}", lambda side=side: draw()[side], True, spec.save_projection)  # type: ignore[misc]
            for side, letter in enumerate("BA")
        )
        return B, A


@dataclass(frozen=True, kw_only=True)
class VeRA(RandomPair):
    """The options of VeRA."""

    name = "vera"
    card = Card(
        title="VeRA",
        formula="ΔW = diag(λ_b) B diag(λ_d) A; A, B random, frozen, shared by all layers",
        parameters=lambda shape, spec: shape.out + spec.rank,
        paper="arXiv 2310.11454",
        use="When many adapters have to be stored: an adapter is two vectors per matrix.",
    )

    rank: int = rank_option(256, "rows of A and columns of B, both shared by all layers and frozen", pattern=None)
    d_initial: float = option(
        0.1,
        "where every entry of λ_d starts",
        allows=bool,
        shown="a number other than 0, since λ_b starts at zero",
        peft="d_initial",
    )
    dropout: float = dropout_option("vera_dropout")


class VeRADelta(OverPair, of=VeRA):
    """λ_b and λ_d of one matrix; A and B are the pool's."""

    spec: VeRA

    def __init__(self, spec: VeRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.lambda_b = nn.Parameter(torch.zeros(shape.out))
        self.lambda_d = nn.Parameter(torch.full((spec.rank,), spec.d_initial))
        self.projections()

    def draw(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """(widest out, rank) and (rank, widest in), A first."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        A = kaiming((self.spec.rank, in_), generator)
        return kaiming((out, self.spec.rank), generator), A

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.projections()
        own = self.lambda_b  # the model's layers may be on several devices, the pair is on one
        return own[:, None] * B[: self.shape.out].to(own), A[:, : self.shape.in_].to(own)

    def gate(self) -> Tensor | None:
        return self.lambda_d


def kaiming(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform within ±√(6 / columns); the order of operations is that of PEFT, so that a seed gives the same bits."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(size[1]))
    return torch.empty(size).uniform_(-bound, bound, generator=generator)
