"""SHiRA: a few of the weight's own entries train, the rest stay.

    ΔW is zero but for rank · (out + in) entries at fixed places: as many numbers as LoRA of that rank, without its bound

The places are stored with the values. They are random ("random"), or where |W| is largest ("magnitude", the paper's
SHiRA-WM). Values start at zero. An adapter this sparse can be swapped into W in place, and two of them rarely collide;
acting beside the layer it costs a dense ΔW per call. Bhardwaj et al. 2024, arXiv 2406.13175.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import rank_option


@dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """The options of SHiRA."""

    name: ClassVar[str] = "shira"
    peft_type: ClassVar[str | None] = "SHIRA"
    peft_suffix: ClassVar[str] = r"\.shira_weight$"
    peft_ignored: ClassVar[frozenset[str]] = frozenset(
        {"fan_in_fan_out", "init_weights", "mask_type", "runtime_config"}
    )
    card: ClassVar[Card] = Card(
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
        "what random places are drawn from, the same for all layers of a shape; null draws anew",
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

    def build(self, shape: Shape, pool: Pool) -> SHiRADelta:
        return SHiRADelta(self, shape, pool)

    def peft_config(self) -> dict[str, Any]:
        # The file's own indices count; PEFT's mask_type only says how a new adapter gets them, and knows "random" alone.
        return {
            "r": self.rank,
            "mask_type": "random",
            "random_seed": self.seed,
            "init_weights": True,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self:
        return cls(rank=config.get("r", 32), seed=config.get("random_seed"))


class SHiRADelta(Delta):
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

    def peft_keys(self, kind: str) -> dict[str, tuple[str, str]]:
        return {"values": ("shira_weight", ""), "indices": ("shira_indices", "")}
