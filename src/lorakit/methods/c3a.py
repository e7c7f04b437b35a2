"""C3A: a matrix of circulant blocks, one trained row per block.

    ΔW[i b + p, j b + q] = k[i, j, (q - p) mod b] / in          k (out/b, in/b, b), b = block_size

A product with it is a circular correlation, done by transforms of length b; its rank can be full. Parameters are those of
a dense matrix over b. k starts Xavier-uniform as in the paper, so that a new adapter does change the model, a little (the
change is divided by `in`); `start_zero` starts at the base model and trains as well. The division makes it weak on
embeddings, where `in` is the vocabulary. Chen et al. 2024, arXiv 2407.19342.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.options import check_divides_sides


@dataclass(frozen=True, kw_only=True)
class C3A(Method):
    """The options of C3A."""

    name = "c3a"
    card = Card(
        title="C3A",
        formula="ΔW = blocks circ(k_ij) / in",
        parameters=lambda shape, spec: shape.out * shape.in_ // spec.block_size,
        paper="arXiv 2407.19342",
        use="When full rank is wanted at LoRA's number of trained values.",
        limits="block_size divides both sides of every matrix",
        identity=False,
    )

    block_size: int = option(
        256,
        "side of a circulant block; divides both sides of every matrix; larger means fewer numbers",
        minimum=1,
        peft="block_size",
        pattern="block_size_pattern",
    )
    start_zero: bool = option(
        False,
        "start at zero instead of Xavier-uniform",
        peft="init_weights",
        peft_default="xavier_uniform",
        from_peft=lambda value: value is True,
        to_peft=lambda zero: True if zero else "xavier_uniform",
    )

    def check(self, shape: Shape, path: str) -> None:
        check_divides_sides("block_size", self.block_size, shape, path)


class C3ADelta(Delta, of=C3A):
    """k of one matrix: (out/b, in/b, b)."""

    spec: C3A

    def __init__(self, spec: C3A, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        b = spec.block_size
        self.k = nn.Parameter(torch.zeros(shape.out // b, shape.in_ // b, b))
        if not spec.start_zero:
            bound = math.sqrt(6 / (shape.out + shape.in_))
            with torch.no_grad():
                self.k.uniform_(-bound, bound)

    def dense(self, W: Tensor) -> Tensor:
        # Row p of a block is k turned by p: all rows are windows of k written twice.
        twice = torch.cat([self.k[..., 1:], self.k], dim=-1)
        blocks = twice.unfold(-1, self.spec.block_size, 1).flip(-2)
        return blocks.permute(0, 2, 1, 3).reshape(self.shape.out, self.shape.in_) / self.shape.in_

    def act(self, call: Call) -> Tensor:
        return call.through(self.correlate, lambda: self.dense(call.W))

    def correlate(self, x: Tensor) -> Tensor:
        """ΔW x by transforms along the blocks, (..., in) -> (..., out), in single precision or better."""
        b, dtype = self.spec.block_size, torch.promote_types(x.dtype, torch.float32)
        parts = torch.fft.rfft(x.to(dtype).unflatten(-1, (-1, b)), dim=-1)
        rows = torch.fft.rfft(self.k.to(dtype), dim=-1).conj()
        y = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", parts, rows), n=b, dim=-1)
        change: Tensor = y.flatten(-2) / self.shape.in_
        return change.to(x.dtype)
