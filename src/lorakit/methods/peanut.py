"""PEANuT: a small network reads the weight and gives the factor A of its change.

    ΔW = s B h, h = f(A W)          A (rank, out), B (out, rank); with `depth` d: h ← f(E_i h) d times, then h ← f(D_i h) + h_i

f is an activation; E_i and D_i (rank, rank), and h_i what h was on the way in, the last one first. B starts at zero. A product
with the weight per call is what it costs. arXiv 2410.01870.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Card, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.methods.fromweight import FromWeight
from lorakit.methods.options import rank_option

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}
DEEPEST = 16


@dataclass(frozen=True, kw_only=True)
class PEANuT(Method):
    """The options of PEANuT."""

    name = "peanut"
    card = Card(
        title="PEANuT",
        formula="ΔW = s B f(A W), through further layers with `depth`",
        parameters=lambda shape, spec: 2 * spec.rank * (shape.out + spec.depth * spec.rank),
        paper="arXiv 2410.01870",
        use="When a low-rank change is too stiff, and the weight itself should say what changes.",
    )

    rank: int = rank_option(32, "width of the network", pattern=None)
    depth: int = option(0, "further layers on each way", minimum=0, maximum=DEEPEST, peft="depth")
    activation: Literal["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"] = option(
        "relu", "the network's f", peft="act_fn"
    )
    scale: float = option(1.0, "s", peft="scaling")


class PEANuTDelta(FromWeight, of=PEANuT):
    """A, B, and E_i, D_i of one matrix."""

    spec: PEANuT

    def __init__(self, spec: PEANuT, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        rank = spec.rank

        def drawn(*size: int) -> nn.Parameter:
            bound = 1 / math.sqrt(size[1])
            return nn.Parameter(torch.empty(size).uniform_(-bound, bound))

        self.A, self.B = drawn(rank, shape.out), nn.Parameter(torch.zeros(shape.out, rank))
        for number in range(spec.depth):
            setattr(self, f"E{number}", drawn(rank, rank))
            setattr(self, f"D{number}", drawn(rank, rank))

    def factors_of(self, W: Tensor) -> tuple[Tensor, Tensor]:
        f, depth = _ACTIVATIONS[self.spec.activation], range(self.spec.depth)
        h, way = f(self.A @ W), []
        for number in depth:
            way.append(h)
            h = f(self.get_parameter(f"E{number}") @ h)
        for number in depth:
            h = f(self.get_parameter(f"D{number}") @ h) + way.pop()
        return self.spec.scale * self.B, h
