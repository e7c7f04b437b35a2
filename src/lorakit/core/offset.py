"""A start away from zero that is taken off again, so that the base stays the model that it is."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lorakit.core.combinator import Combined
from lorakit.core.delta import Delta, LowRank
from lorakit.errors import LorakitError


class Offset(Combined, LowRank):
    """A low-rank delta that starts elsewhere than at zero, less that start: `ΔW = s (B diag(g) A - B₀ A₀)`.

    Starts that are read off the weights (PiSSA and its kin) would otherwise have to be subtracted from the base, which
    then is no longer the model that other adapters, files and users know. Here the base stays as it is; the same function
    is trained, and what comes out is an exact plain low-rank change of twice the rank.

    It is computed as `B diag(g) (A - A₀) + (B diag(g) - B₀) A₀`, which is the same and exactly zero at the start: both
    differences are taken in the master's precision, so that steps far below A's rounding in bfloat16 are not lost.
    """

    inner: LowRank

    def __init__(self, inner: LowRank) -> None:
        super().__init__(inner.spec, inner.shape, inner.pool)
        self.inner = inner
        B, A = inner.gated()
        self.start = inner.scale
        self.register_buffer("minus_B0", -B.detach().clone())
        self.register_buffer("A0", A.detach().clone())

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.inner.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.inner.factors()
        minus_B0, A0 = cast(Tensor, self.minus_B0), cast(Tensor, self.A0)
        if self.start != self.inner.scale:  # DyLoRA's scale moves with the rank it draws
            minus_B0 = minus_B0 * (self.start / self.inner.scale)
        if A.shape != A0.shape:  # the method has changed its rank since: the two products side by side
            return torch.cat([B, minus_B0], dim=1), torch.cat([A, A0])
        gated, _ = self.inner.gated()
        return torch.cat([B, gated + minus_B0], dim=1), torch.cat([A - A0, A0])

    def gate(self) -> Tensor | None:
        gate = self.inner.gate()
        return None if gate is None else torch.cat([gate, gate.new_ones(cast(Tensor, self.A0).shape[0])])

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [*self.inner.pairs(), (cast(Tensor, self.minus_B0), cast(Tensor, self.A0))]

    def set_factors(self, B: Tensor, A: Tensor) -> None:
        self.inner.set_factors(B, A)


def offset(delta: Delta) -> Delta:
    """The delta with its low-rank part less what that part is now; within a combinator, the part inside it."""
    if isinstance(delta, LowRank):
        if type(delta).shift is not Delta.shift:
            raise LorakitError(
                f"attach: {delta.spec.name} has a bias of its own here (lora_bias=True), and a start that is taken off again "
                'has no place for one; init="default" and the other starts with B at zero work.'
            )
        return Offset(delta)
    if not isinstance(delta, Combined):
        raise LorakitError(f"{delta.spec.name} has no low-rank factors, so it has no start to take off.")
    delta.inner = offset(delta.inner)
    return delta
