"""Arrow: route by the adapters' own weights; nothing is trained.

    v_e = the right singular vector of ΔW_e of the largest singular value      z_e = |x · v_e| / temperature
    y = W x + Σ_e w_e ΔW_e x,   w = softmax over the top_k largest z

v_e is the input direction that expert e changes most; a token goes, in each layer anew, to the experts whose direction it
has most of. It has no sign, so the absolute value is taken; x keeps its length, which sharpens the choice for long x. The
vectors are those of the adapters as they were when the router was made. Ostapenko et al. 2024, arXiv 2405.11157.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lorakit.core.delta import Call, Card, Delta, LowRank
from lorakit.core.layer import Adapted
from lorakit.core.layout import Site
from lorakit.core.options import option
from lorakit.core.spectrum import spectrum, spectrum_of
from lorakit.experts.context import OverAdapters, RouterContext, RouterSpec
from lorakit.experts.gates import softmax_over, top_mask


@dataclass(frozen=True, kw_only=True)
class Arrow(RouterSpec):
    """The options of Arrow."""

    name = "arrow"
    card = Card(
        title="Arrow",
        formula="w = softmax(top-k of |x · v_e|), v_e the top right singular vector of ΔW_e",
        parameters=lambda shape, spec: 0,
        paper="arXiv 2405.11157",
        use="Many adapters, no data to train a router on, every token and layer to its own.",
        limits="A weight per token: cannot be merged.",
    )
    top_k: int | None = option(None, "experts per token; null for all", minimum=1)
    temperature: float = option(1.0, "divides the scores; above 1 the weights are more even", above=0)


class ArrowRouter(OverAdapters, of=Arrow):
    """One matrix of directions, (members, in), per adapted matrix; a row of zeros where a member changes nothing."""

    def __init__(self, spec: Arrow, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.spec = spec
        for index, (layer, site, deltas) in enumerate(context.matrices()):
            self.register_buffer(f"V{index}", torch.stack([_direction(layer, site, delta) for delta in deltas]))

    def directions(self, layer: str, site: str = "") -> Tensor:
        """The unit vectors v_e of one matrix, (members, in)."""
        return cast(Tensor, getattr(self, f"V{self.places[layer, site]}"))

    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        V = self.directions(layer, site)
        scores = call.down(V).abs() / self.spec.temperature
        there = V.any(dim=1).to(scores.device)
        kept = top_mask(scores.masked_fill(~there, -torch.inf), self.spec.top_k) & there
        return softmax_over(scores, kept)


def _direction(layer: Adapted, site: Site, delta: Delta | None) -> Tensor:
    """The top right singular vector of a delta's ΔW, (in,); zeros where there is no change."""
    if delta is None:
        return torch.zeros(site.layout.shape.in_)
    with torch.no_grad():
        if isinstance(delta, LowRank) and type(delta).dense is LowRank.dense:
            found = spectrum(*delta.gated())
        else:
            found = spectrum_of(delta.dense(site.layout.matrix(layer.stored(site))))
        v = found.Vh[0] * bool(found.values.any())
        return v.to(torch.promote_types(next(iter([*delta.parameters(), torch.zeros(())])).dtype, torch.float32))
