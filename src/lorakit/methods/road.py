"""RoAd: the outputs of a layer are turned in pairs and stretched.

    y = R (W x + b)          R turns output i with i + group / 2 of its group: [c_i -s_i; s_j c_j], c = α cos θ, s = α sin θ

    "road_1"   one θ and α for a pair (out / 2 each)
    "road_2"   of their own for each output (out)
    "road_4"   of their own for each entry of R (2 · out): in each group first those of the cosines, then those of the sines

θ starts at zero, α at one. Two or eight numbers an output, that merge. Liao and Monz 2024, arXiv 2409.00119.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, Delta, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import divisors

_HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}
"""How many angles each pair of outputs has."""


@dataclass(frozen=True, kw_only=True)
class RoAd(Method):
    """The options of RoAd."""

    name = "road"
    card = Card(
        title="RoAd",
        formula="y = R (W x + b), R turns and stretches outputs in pairs",
        parameters=lambda shape, spec: _HALVES[spec.variant] * shape.out,
        paper="arXiv 2409.00119",
        use="When adapters must be tiny, as IA3's, and a gain for each output is too weak.",
        limits="The group divides the number of outputs.",
    )

    variant: Literal["road_1", "road_2", "road_4"] = option(
        "road_1", "how many angles a pair of outputs has: 1, 2 or 4", peft="variant"
    )
    group: int = option(
        64,
        "outputs in a group, in which i is turned with i + group / 2",
        allows=lambda size: size % 2 == 0,
        minimum=2,
        shown="an even number of at least 2",
        peft="group_size",
    )

    def check(self, shape: Shape, path: str) -> None:
        if shape.out % self.group:
            fit = [size for size in divisors(shape.out) if size % 2 == 0]
            raise LorakitError(
                f"attach: group {self.group} does not divide the {shape.out} outputs of {path}; "
                f"{', '.join(map(str, fit[-6:])) or 'no even number'} would. Or leave the layer out."
            )


class RoAdDelta(Delta, of=RoAd):
    """θ and α of one matrix."""

    spec: RoAd

    def __init__(self, spec: RoAd, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        count = _HALVES[spec.variant] * shape.out // 2
        self.theta, self.alpha = nn.Parameter(torch.zeros(count)), nn.Parameter(torch.ones(count))

    def turned(self, y: Tensor) -> Tensor:
        """`(R - I) y` for y (out, …)."""
        theta: Tensor = self.theta
        alpha: Tensor = self.alpha
        g = self.spec.group
        if self.spec.variant == "road_4":
            split = [angles.view(-1, 2, g).transpose(0, 1).flatten(1) for angles in (theta, alpha)]
            (theta, other_theta), (alpha, other_alpha) = split
        else:
            if self.spec.variant == "road_1":
                theta, alpha = (v.view(-1, 1, g // 2).expand(-1, 2, -1).flatten() for v in (theta, alpha))
            other_theta, other_alpha = theta, alpha
        first, second = y.unflatten(0, (-1, 2, g // 2)).unbind(1)
        half = torch.stack([-second, first], dim=1).reshape(y.shape)
        like = [-1] + [1] * (y.ndim - 1)
        change: Tensor = (alpha * theta.cos() - 1).view(like) * y + (other_alpha * other_theta.sin()).view(like) * half
        return change

    def dense(self, W: Tensor) -> Tensor:
        return self.turned(W)

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        return None if b is None else self.turned(b)
