"""The family whose low-rank factors are made of the weight itself: `ΔW = B A(W)`."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lorakit.core.delta import Call, Delta


class FromWeight(Delta):
    """A member writes `factors_of`."""

    @abstractmethod
    def factors_of(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, A)`: (out, rank) and (rank, in), for the frozen weight in the precision of the trained tensors or better."""

    def _factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return self.factors_of(W.to(torch.promote_types(W.dtype, next(self.parameters()).dtype)))

    def dense(self, W: Tensor) -> Tensor:
        B, A = self._factors(W)
        return B @ A

    def act(self, call: Call) -> Tensor:
        return call.product(*self._factors(call.W))
