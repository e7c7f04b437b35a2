"""LoRA-FA's corrected gradient: the step of B that comes nearest to a step of the whole weight.

With A frozen, B's gradient is g = s G Aᵀ for the gradient G of the weight. The B-step whose ΔW is nearest to G is

    ĝ = (1 / s²) g (A Aᵀ + ε I)⁻¹          minimises ‖s ĝ A - G‖

and is what the optimiser is given. The factors are paired by the adapter, never by their order in a list. For an
embedding, where B is frozen and A trains, ĝ = (1 / s²) (Bᵀ B + ε I)⁻¹ g. arXiv 2308.03303.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter

EPSILON = 1e-8


@dataclass
class Correction:
    """One pair: the factor that trains, its frozen partner and the scale of their product."""

    trained: nn.Parameter
    frozen: Tensor
    scale: float
    left: bool = False
    """The trained factor is A, so that the inverse stands on its left."""

    def __post_init__(self) -> None:
        self._of: int | None = None
        self._inverse: Tensor | None = None

    def inverse(self) -> Tensor:
        """(A Aᵀ + ε I)⁻¹ / s², (rank, rank); made once, as A does not move."""
        if self._inverse is None or self._of != self.frozen._version:
            F = self.frozen.detach().double()
            F = F.T @ F if self.left else F @ F.T
            F = F + EPSILON * torch.eye(F.shape[0], dtype=F.dtype, device=F.device)
            self._inverse = (torch.linalg.inv(F) / self.scale**2).to(self.trained)
            self._of = self.frozen._version
        return self._inverse

    def apply(self) -> None:
        """Correct the gradient in place."""
        gradient = self.trained.grad
        if gradient is not None:
            gradient.copy_(self.inverse() @ gradient if self.left else gradient @ self.inverse())


def corrections_of(adapter: Adapter) -> list[Correction]:
    """The pairs of an adapter whose method asks for the correction; none for other methods."""
    found = []
    for _, _, delta in adapter.deltas():
        low_rank = delta.low_rank()
        if low_rank is None or not getattr(low_rank.spec, "corrected", False):
            continue
        held: Any = low_rank
        left = held.A.requires_grad
        trained, frozen = (held.A, held.B) if left else (held.B, held.A)
        found.append(Correction(trained, frozen, low_rank.scale, left))
    return found


def correct_gradients(optimizer: torch.optim.Optimizer, corrections: Iterable[Correction]) -> None:
    """Let every step of the optimiser begin by correcting these gradients. Works with any optimiser."""
    pairs = list(corrections)

    def before(*_: Any) -> None:
        for pair in pairs:
            pair.apply()

    if pairs:
        optimizer.register_step_pre_hook(before)
