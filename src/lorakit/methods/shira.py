"""SHiRA: a few of the weight's own entries train, the rest stay.

    ΔW is zero but for rank · (out + in) entries at fixed places: as many numbers as LoRA of that rank, without its bound

The places are stored with the values. They are random ("random"), or where |W| is largest ("magnitude", the paper's
SHiRA-WM). Values start at zero. An adapter this sparse can be swapped into W in place, and two of them rarely collide;
acting beside the layer it costs a dense ΔW per call. Bhardwaj et al. 2024, arXiv 2406.13175.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import rank_option


@dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """The options of SHiRA."""

    name = "shira"
    card = Card(
        title="SHiRA",
        formula="ΔW sparse: trained values at fixed places",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_),
        paper="arXiv 2406.13175",
        use="When adapters are merged together or swapped in place: sparse ones hardly meet.",
        limits="rank · (out + in) is at most out · in",
    )

    rank: int = rank_option(32, "rank · (out + in) entries train; it does not bound the rank of ΔW", pattern=None)
    mask: Literal["random", "magnitude"] = option(
        "random", "which entries train: random ones, or the largest of the weight"
    )
    seed: int | None = option(
        None,
        "what random places are drawn from, the same for all layers of a shape; null draws new ones",
        peft="random_seed",
    )

    def check(self, shape: Shape, path: str) -> None:
        if self.rank * (shape.out + shape.in_) > shape.out * shape.in_:
            most = shape.out * shape.in_ // (shape.out + shape.in_)
            raise LorakitError(
                f"attach: rank {self.rank} asks for {self.rank * (shape.out + shape.in_)} trained entries in {path}, which has "
                f"{shape.out * shape.in_} ({shape.out} × {shape.in_}). "
                + (f"A rank of {most} or less fits." if most else "It is too small for any rank; leave it out.")
            )


class SHiRADelta(Delta, of=SHiRA):
    """The trained values of one matrix (n,), and their rows and columns (2, n), in the order of the weight's memory."""

    spec: SHiRA

    def __init__(self, spec: SHiRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        count = spec.rank * (shape.out + shape.in_)
        self.values = nn.Parameter(torch.zeros(count))
        generator = None if spec.seed is None else torch.Generator().manual_seed(spec.seed)
        self.register_buffer(
            "indices", self._indices(torch.randperm(shape.out * shape.in_, generator=generator)[:count])
        )
        self.indices: Tensor

    def _indices(self, flat: Tensor) -> Tensor:
        flat = flat.sort().values
        return torch.stack([flat // self.shape.in_, flat % self.shape.in_]).int()

    def begin(self, W: Tensor) -> None:
        if self.spec.mask == "magnitude":
            largest = W.detach().abs().flatten().topk(self.values.numel(), sorted=False).indices
            self.indices.copy_(self._indices(largest))

    def dense(self, W: Tensor) -> Tensor:
        rows, columns = self.indices.long()
        zero = self.values.new_zeros(self.shape.out, self.shape.in_)
        return zero.index_put((rows, columns), self.values)
