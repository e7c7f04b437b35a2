"""MoLE: in every layer a learned gate over frozen adapters, which sees what each of them would add.

    E_e = ΔW_e x (out,)      E = (E_1, …, E_n) / ‖(E_1, …, E_n)‖      ε = e · E (n,)      w = softmax(ε / τ)
    y = W x + Σ_e w_e E_e

e (n, n · out) and τ train, one of each per matrix. The paper flattens all tokens of a sequence into one gate, which asks for
one length; here each token has its own. Nothing of size n · out is made: ε and the norm are products of the rank-wide A x
with B e and BᵀB. Each gate has `balance · (-Σ_e log q_e)` added to its loss, q_e its mean weight of expert e, meant over all
gates. It starts with equal weights. Wu et al. 2024, arXiv 2404.13628.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, LowRank
from lorakit.core.options import option
from lorakit.core.uniform import is_product
from lorakit.errors import LorakitError
from lorakit.experts.context import OverAdapters, RouterContext, RouterSpec
from lorakit.experts.gates import share_loss


@dataclass(frozen=True, kw_only=True)
class MoLE(RouterSpec):
    """The options of MoLE."""

    name = "mole"
    card = Card(
        title="MoLE",
        formula="w = softmax(e · normalised(ΔW_1 x, …, ΔW_n x) / τ), per token and layer",
        parameters=lambda shape, spec: 0,
        paper="arXiv 2404.13628",
        use="A few adapters to be composed, and data of the composition.",
        limits="Experts with factors; a weight per token: cannot be merged.",
    )
    balance: float = option(0.5, "coefficient of the balance loss; 0.5 in the paper")
    temperature: float = option(1.0, "temperature of the softmax at the start", above=0)


class MoLERouter(OverAdapters, of=MoLE):
    """`e0`, `e1`, … (members, members, out) and `t0`, … (the logarithm of τ), a pair per adapted matrix."""

    def __init__(self, spec: MoLE, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.spec = spec
        self._deltas: dict[int, tuple[LowRank | None, ...]] = {}
        n = len(self.members)
        for index, (_, site, deltas) in enumerate(context.matrices()):
            for name, delta in zip(self.members, deltas, strict=True):
                if delta is not None and not is_product(delta):
                    raise LorakitError(
                        f"route: mole needs experts with low-rank factors, and {name!r} ({delta.spec.name}) is more "
                        "than a product of factors; Arrow, LoRAHub and X-LoRA take any method."
                    )
            self._deltas[index] = tuple(cast("list[LowRank | None]", deltas))
            self.register_parameter(f"e{index}", nn.Parameter(torch.zeros(n, n, site.layout.shape.out)))
            self.register_parameter(f"t{index}", nn.Parameter(torch.tensor(spec.temperature).log()))

    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        index = self.places[layer, site]
        e, t = cast(Tensor, getattr(self, f"e{index}")), cast(Tensor, getattr(self, f"t{index}"))
        scores, squares = [], []
        for place, delta in enumerate(self._deltas[index]):
            if delta is None:
                continue
            B, A = delta.factors()
            h, gate = call.down(A) * delta.scale, delta.gate()
            h = h if gate is None else h * gate.to(h.dtype)
            B = B.to(h.dtype)
            scores.append(h @ (e[:, place].to(h.dtype) @ B).T)
            squares.append(((h @ (B.T @ B)) * h).sum(-1, keepdim=True))
        square = sum(squares[1:], squares[0])
        # where nothing is added there is no direction either, and no gradient through the root of zero
        norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
        logits = sum(scores[1:], scores[0]) / norm / t.exp()
        mask = torch.tensor([delta is not None for delta in self._deltas[index]], device=logits.device)
        w = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        self._note(w[..., mask])
        return w

    def _note(self, weights: Tensor) -> None:
        notes = self.state.notes
        if notes.losses is None or weights.shape[-1] < 2:
            return
        counts = notes.counts
        if counts is not None and counts.numel() != weights.shape[:-1].numel():
            counts = None
        notes.losses.append(functools.partial(self.loss, weights, counts))

    def loss(self, weights: Tensor, counts: Tensor | None) -> Tensor:
        """One gate's share of what is added to the training loss."""
        return self.spec.balance * share_loss(weights, counts) / len(self.places)
