"""The delta of a layer that shares its weight with another, and follows that one's delta: a tied head after its embedding."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from lorakit.core.delta import Delta, LowRank, Shape
from lorakit.errors import LorakitError


class Tied(LowRank):
    """The change of another layer's weight as this layer has it, transposed. It holds no tensor of its own."""

    def __init__(self, leader: LowRank, shape: Shape) -> None:
        super().__init__(leader.spec, shape, leader.pool)
        self.leader = (leader,)

    @property
    def scale(self) -> float:  # type: ignore[override]
        return float(self.leader[0].scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.leader[0].factors()
        return A.T, B.T

    def gate(self) -> Tensor | None:
        return cast(LowRank, self.leader[0]).gate()


def follower(leader: Delta, shape: Shape, path: str) -> Delta:
    """The delta that follows `leader`, of an embedding, in the layer at `path`; LorakitError where it has no form there."""
    own = leader.follower(shape)
    if own is None:
        if not isinstance(leader, LowRank) or type(leader).act is not LowRank.act:
            raise LorakitError(
                f"attach: {path} shares its weight with an adapted embedding, and {leader.spec.name} is no product of two "
                "factors that both could have; ensure_weight_tying works with lora and similar methods."
            )
        own = Tied(leader, shape)
    return own
