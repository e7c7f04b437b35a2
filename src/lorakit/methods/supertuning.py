"""Super-Tuning: the largest entries of the weight train, and a LoRA beside them if it is given a rank.

    ΔW is zero but for n trained values where |W| is largest, + s B A          n = ⌊out · in · (1 - sparsity)⌋, s = alpha / rank

`largest=False` takes the smallest entries. The places are kept with the values, or found again in the base, which then must
be the same to the bit. SHiRA with mask="magnitude" is the same family with LoRA's count of values. arXiv 2607.09287.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.lora import start_factors
from lorakit.methods.options import dropout_option


def _count(shape: Shape, spec: SuperTuning) -> int:
    """How many entries train."""
    return int(shape.out * shape.in_ * (1 - spec.sparsity))


@dataclass(frozen=True, kw_only=True)
class SuperTuning(Method):
    """The options of Super-Tuning."""

    name = "supertuning"
    card = Card(
        title="Super-Tuning",
        formula="ΔW sparse where |W| is largest, + s B A",
        parameters=lambda shape, spec: _count(shape, spec) + (spec.rank or 0) * (shape.out + shape.in_),
        paper="arXiv 2607.09287",
        use="When few entries should carry the change, chosen by the weight itself.",
        limits="At least one entry is left to train.",
    )

    sparsity: float = option(0.99, "share of the entries that do not train", minimum=0, below=1, peft="sparsity")
    largest: bool = option(True, "train the largest entries; else the smallest", peft="select_top")
    rank: int | None = option(None, "rank of a LoRA beside them", minimum=1, peft="r")
    alpha: float | None = option(None, "numerator of its scale, alpha / rank; 2 rank if not given", peft="lora_alpha")
    dropout: float = dropout_option()
    save_indices: bool = option(
        True, "keep the places in the file; else the base gives them", peft="save_precomputed_indices"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None and self.alpha is not None:
            raise LorakitError(f"supertuning: alpha={self.alpha} scales a LoRA, and there is none without rank.")
        if self.rank is not None and self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)

    def check(self, shape: Shape, path: str) -> None:
        if not _count(shape, self):
            raise LorakitError(
                f"attach: sparsity {self.sparsity} leaves none of the {shape.out * shape.in_} entries of {path} to train; "
                "lower it, or leave the layer out."
            )


class SuperTuningDelta(Delta, of=SuperTuning):
    """The trained values of one matrix (n,), their places in it row by row (n,), and A and B."""

    spec: SuperTuning

    def __init__(self, spec: SuperTuning, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        count = _count(shape, spec)
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("indices", torch.arange(count, dtype=torch.int32), persistent=spec.save_indices)
        self.indices: Tensor
        if spec.rank is not None:
            self.B, self.A = map(nn.Parameter, start_factors(shape, spec.rank))
            self.scale = float(spec.alpha or 0) / spec.rank

    def begin(self, W: Tensor) -> None:
        size = W.detach().abs().flatten()
        self.indices.copy_(size.topk(len(self.indices), largest=self.spec.largest).indices)

    def sparse(self) -> Tensor:
        """The trained values in their places, (out, in)."""
        zero = self.values.new_zeros(self.shape.out * self.shape.in_)
        return zero.index_put((self.indices.long(),), self.values).view(self.shape.out, self.shape.in_)

    def dense(self, W: Tensor) -> Tensor:
        return self.sparse() if self.spec.rank is None else self.sparse() + self.scale * self.B @ self.A

    def act(self, call: Call) -> Tensor:
        y = call.linear(self.sparse())
        if self.spec.rank is None:
            return y
        return y + call.product(self.B, self.A, None, self.scale, self.dropout if self.training else 0.0)

    def roles(self) -> dict[str, str]:
        return {"A": "B", "B": "A"} if self.shape.lookup else {}
