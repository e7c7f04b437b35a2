"""The family that turns a weight instead of adding to it: `W' = diag(s) W Rᵀ`, R orthogonal.

Inputs are turned before they meet the weight: `y = (x R) Wᵀ`, which leaves the lengths of W's rows and the angles between
them as they are. The columns of an embedding's matrix are vocabulary entries and not features, so there the rows of the
table are turned instead: `W' = Rᵀ W`.

Everything is computed from R - I, not from R: at the start that is exactly zero, and in low precision a small turn is not
lost beside the one that stands on R's diagonal.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.delta import Call, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import divisors, is_lenient


def turned_size(shape: Shape) -> int:
    """The size of R: the inputs, or an embedding's features."""
    return shape.out if shape.lookup else shape.in_


def blocks_option(doc: str, peft: str, peft_default: int = 0) -> Any:
    """The size or the number of blocks; PEFT has 0 where it is not given."""
    return option(
        None,
        doc,
        minimum=1,
        peft=peft,
        peft_default=peft_default,
        from_peft=lambda size: size or None,
        to_peft=lambda size: size or 0,
    )


class InBlocks(Method):
    """A rotation by blocks, of which either the size or the number is given; else the size is `usual_size`."""

    usual_size: ClassVar[int]
    block_size: int | None
    blocks: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.blocks is not None:
            raise LorakitError(
                f"{self.name}: block_size={self.block_size} and blocks={self.blocks} were both given; their product is the "
                "layer's size, so give one of them."
            )
        if self.block_size is None and self.blocks is None:
            object.__setattr__(self, "block_size", self.usual_size)

    @property
    def unit(self) -> int:
        """The one that is given."""
        return self.blocks or cast(int, self.block_size)

    def check(self, shape: Shape, path: str) -> None:
        size, unit = turned_size(shape), self.unit
        if size % unit and not is_lenient():
            near = sorted(sorted(divisors(size), key=lambda number: abs(number - unit))[:4])
            raise LorakitError(
                f"attach: {self.name} turns {size} features of {path} in blocks, and "
                f"{'blocks' if self.blocks else 'block_size'} {unit} does not divide {size}. Near it "
                f"{', '.join(map(str, near))} do; or leave the layer out."
            )


def cayley(Q: Tensor) -> Tensor:
    """`(I + Q)(I - Q)⁻¹ - I = 2 Q (I - Q)⁻¹` for skew Q (blocks, size, size): a rotation, less the identity."""
    wide = Q.float() if Q.dtype in (torch.float16, torch.bfloat16) else Q  # torch solves in no narrower floats
    eye = torch.eye(Q.shape[-1], dtype=wide.dtype, device=Q.device)
    K: Tensor = torch.linalg.solve(eye - wide, 2 * wide, left=False)
    return K.to(Q.dtype)


def skew(upper: Tensor, size: int) -> Tensor:
    """Skew matrices (…, size, size) from their strict upper triangles (…, size (size - 1) / 2), row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    places = rows * size + columns
    whole: Tensor = (
        upper.new_zeros(*upper.shape[:-1], size * size).index_copy(-1, places, upper).unflatten(-1, (size, size))
    )
    return whole - whole.mT


def within(upper: Tensor, eps: float | None) -> Tensor:
    """Triangles whose skew matrices are longer than `eps` (Frobenius) scaled back to that."""
    if eps is None:
        return upper
    norm = math.sqrt(2) * torch.linalg.vector_norm(upper, dim=-1, keepdim=True)
    scaled: Tensor = upper * (eps / norm.clamp_min(eps))
    return scaled


def series(Q: Tensor, terms: int) -> Tensor:
    """What `cayley` is by the first terms of its series, 2Q + 2Q² + … + Q^(terms - 1)."""
    K, power = 2 * Q, Q
    for order in range(2, terms):
        power = power @ Q
        K = K + power * (1 if order == terms - 1 else 2)
    return K


class Rotation(Delta):
    """`W' = diag(s) W Rᵀ`; a member writes `change` and, if it has output scales, `gain`."""

    def __init__(self, spec: Method, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.size = turned_size(shape)

    @abstractmethod
    def change(self, x: Tensor, back: bool = False) -> Tensor:
        """`x (R - I)`, or `x (Rᵀ - I)` with `back`; x is (..., size)."""

    def gain(self) -> Tensor | None:
        """The output scales s, (out,), or None where they are 1."""
        return None

    def thin(self, blocks: Tensor) -> Tensor:
        """Multiplicative dropout: while training, this share of the blocks R - I (blocks, c, c) is zero."""
        count = int(self.dropout * blocks.shape[0]) if self.training else 0
        if not count:
            return blocks
        return blocks.index_fill(0, torch.randperm(blocks.shape[0], device=blocks.device)[:count], 0)

    def _turn(self, W: Tensor) -> Tensor:
        """The change of the weight without the output scales."""
        return self.change(W.T).T if self.shape.lookup else self.change(W, back=True)

    def dense(self, W: Tensor) -> Tensor:
        W = W.to(torch.promote_types(W.dtype, next(self.parameters()).dtype))
        change, s = self._turn(W), self.gain()
        return change if s is None else s[:, None] * (W + change) - W

    def act(self, call: Call) -> Tensor:
        change = self.change(call.y) if self.shape.lookup else self._changed(call)
        s = self.gain()
        return change if s is None else call.gain(change, s) + call.gain(call.y, s - 1)

    def _changed(self, call: Call) -> Tensor:
        def product(x: Tensor) -> Tensor:
            W = call.W.to(call.dtype)
            # A turned weight would need a gradient as large as W; without gradients it is the cheaper one for long inputs.
            if not torch.is_grad_enabled() and x.numel() > W.numel():
                return F.linear(x, self.change(W, back=True))
            return F.linear(self.change(x), W)

        return call.through(product, lambda: self._turn(call.W.to(torch.promote_types(call.W.dtype, call.dtype))))

    def output(self, call: Call) -> Tensor | None:
        if self.shape.lookup:
            return None
        y = call.through(
            lambda x: F.linear(x + self.change(x), call.W.to(call.dtype)), lambda: call.W + self._turn(call.W)
        )
        s = self.gain()
        return y if s is None else call.gain(y, s)


def turn_blocks(x: Tensor, K: Tensor) -> Tensor:
    """`x` (..., blocks · c) times the block-diagonal matrix of `K` (blocks or 1, c, c)."""
    c = K.shape[-1]
    pieces = x.reshape(-1, x.shape[-1] // c, c).transpose(0, 1)
    turned = torch.matmul(pieces, K.to(x.dtype))  # a shared block broadcasts
    return turned.transpose(0, 1).reshape(x.shape)
