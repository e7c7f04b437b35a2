"""Bottleneck adapters: a small network of two matrices, its result added to what a sub-layer gives.

    y ← y + U f(D y + d) + u        "houlsby": after each attention's and the feed-forward's last matrix
                                    "pfeiffer": after the feed-forward's alone
    y ← y + s (U f(D x + d) + u)    "parallel": beside the feed-forward, on its input x

D (size, hidden), U (hidden, size). U starts at zero, so that the model begins as its base, or with a small `spread`
(Houlsby: 0.01). All stand before the residual sum; in a model that norms after the sum (BERT) the authors of "pfeiffer" put
theirs behind the norm, and dropout, where the model has some, comes after the adapter. A block of width 576 trains 2 · (2 ·
576 · 64 + 576 + 64) numbers at size 64. Costs latency that no merge takes away. Houlsby et al. 2019, arXiv 1902.00751;
Pfeiffer et al. 2021, arXiv 2005.00247; He et al. 2022, arXiv 2110.04366 (parallel, s = 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.edits.contract import Anatomy, Change, EditMethod, Place, in_blocks
from lorakit.errors import LorakitError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(EditMethod):
    """The options of bottleneck adapters."""

    name = "bottleneck"
    reason = "a nonlinearity stands between its two matrices"
    card = Card(
        title="Bottleneck adapters (Houlsby, Pfeiffer, parallel)",
        formula="y + U f(D y + d) + u",
        parameters=lambda anatomy, spec: (
            len(spec.places(anatomy, None)) * (2 * anatomy.hidden * spec.size + anatomy.hidden + spec.size)
        ),
        paper="arXiv 1902.00751",
        use="When quality per trained number counts and a merge does not: strong on few examples.",
    )

    size: int = option(64, "width of the bottleneck", minimum=1)
    placement: Literal["houlsby", "pfeiffer", "parallel"] = option(
        "houlsby",
        "after attention and feed-forward (houlsby), after the feed-forward alone (pfeiffer), or beside it (parallel)",
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = option("relu", "function between the two matrices")
    scale: float = option(1.0, "factor of what is added; 4 is the parallel paper's, 1 the others'")
    spread: float = option(0.0, "standard deviation of U at the start; 0 starts as the base", minimum=0)

    def places(self, anatomy: Anatomy, layers: Sequence[int] | None) -> list[Place]:
        found = []
        for blocks in (anatomy.blocks, anatomy.decoder_blocks):
            for block in in_blocks(blocks, layers, self.name) if blocks else ():
                if block.feed_forward is None or (self.placement == "houlsby" and not block.projections):
                    raise LorakitError(
                        f"attach: {block.path} needs a feed-forward part and attention of linear layers for a {self.name}, and "
                        "they were not found."
                    )
                first, last = block.feed_forward
                if self.placement == "houlsby":
                    found += [Place(path) for path in block.projections]
                found.append(Place(last, first if self.placement == "parallel" else ""))
        return found

    def build(self, place: Place, anatomy: Anatomy, folded: bool = False) -> BottleneckEdit:
        return BottleneckEdit(self, place, anatomy.hidden)


class BottleneckEdit(Change):
    """D (size, hidden), d (size,), U (hidden, size), u (hidden,)."""

    def __init__(self, spec: Bottleneck, place: Place, hidden: int) -> None:
        super().__init__(spec, place)
        self.D = nn.Parameter(torch.empty(spec.size, hidden))
        self.d = nn.Parameter(torch.zeros(spec.size))
        self.U = nn.Parameter(torch.zeros(hidden, spec.size))
        self.u = nn.Parameter(torch.zeros(hidden))
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))
        if spec.spread:
            nn.init.trunc_normal_(self.U, std=spec.spread, a=-2 * spec.spread, b=2 * spec.spread)
        self.activation, self.scale = ACTIVATIONS[spec.activation], spec.scale

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        h = x if self.place.source else y
        D, d, U, u = (one.to(h.dtype) for one in (self.D, self.d, self.U, self.u))
        return self.scale * F.linear(self.activation(F.linear(h, D, d)), U, u)
