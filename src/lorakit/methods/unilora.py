"""Uni-LoRA: all factors of a model are read from one trained vector.

    ΔW = B A, every entry of A and B is θ[i] / √n_i          θ (length) shared by all layers, i random and fixed

Each entry of θ is read equally often (n_i times, but for a remainder), in an order from a seed: the projection keeps lengths.
θ starts uniform within ± bound, so that a new adapter changes the model, a little. The file holds θ, and the places where that
is asked for. arXiv 2506.00799.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import dropout_option, rank_option


@functools.lru_cache(maxsize=1)
def _places(count: int, length: int, seed: int) -> Tensor:
    """Which entry of θ each of `count` numbers reads. numpy's generator, as in PEFT: a seed then means the same places."""
    generator = np.random.default_rng(seed)
    places = np.repeat(np.arange(length), count // length)
    if rest := count % length:
        places = np.concatenate([places, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(places)
    return torch.as_tensor(places)


@dataclass(frozen=True, kw_only=True)
class UniLoRA(Method):
    """The options of Uni-LoRA."""

    name = "unilora"
    card = Card(
        title="Uni-LoRA",
        formula="ΔW = B A, both read from one shared vector θ",
        parameters=lambda shape, spec: 0,
        pooled=lambda shapes, spec: spec.length,
        paper="arXiv 2506.00799",
        use="When a model's whole adapter must be one short vector.",
        identity=False,
    )

    rank: int = rank_option(4, pattern=None)
    length: int = option(256, "numbers in θ", minimum=1, peft="theta_d_length")
    seed: int = option(42, "what the places are drawn from", peft="proj_seed")
    bound: float = option(0.02, "θ starts uniform within ± this", above=0, peft="init_theta_d_bound")
    save_indices: bool = option(
        False, "keep the places in the file, which is then larger than a LoRA's", peft="save_indices"
    )
    dropout: float = dropout_option("unilora_dropout")


class UniLoRADelta(LowRank, of=UniLoRA):
    """Which entry of θ each number of A and B reads, and what it is scaled by; θ is the pool's."""

    spec: UniLoRA

    def __init__(self, spec: UniLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        number, shapes = pool.number(), pool.shapes or [shape]
        sizes = [spec.rank * (one.in_ + one.out) for one in shapes]
        places = _places(sum(sizes), spec.length, spec.seed)
        inverse = places.bincount(minlength=spec.length).clamp_min(1).float().rsqrt()
        own = places[sum(sizes[:number]) :][: sizes[number]].split([spec.rank * shape.in_, spec.rank * shape.out])
        for letter, indices, size in zip("AB", own, ((spec.rank, shape.in_), (shape.out, spec.rank)), strict=True):
            indices = indices.view(size).clone()
            self.register_buffer(f"indices_{letter}", indices, persistent=spec.save_indices)
            self.register_buffer(f"scales_{letter}", inverse[indices], persistent=spec.save_indices)
        self.indices_A: Tensor
        self.indices_B: Tensor
        self.scales_A: Tensor
        self.scales_B: Tensor
        self.theta()

    def theta(self) -> Tensor:
        """The shared vector, (length,)."""
        spec = self.spec
        make = lambda: torch.empty(spec.length).uniform_(-spec.bound, spec.bound)  # noqa: E731
        return self.pool.entry("unilora_theta_d", make, frozen=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        theta = self.theta().to(self.scales_A)
        return theta[self.indices_B] * self.scales_B, theta[self.indices_A] * self.scales_A
