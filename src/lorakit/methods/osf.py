"""OSF: the weak singular directions of the weight train, the strong ones stay as they are.

    W = U_h S_h V_h + U S V          the `kept` largest triplets are frozen; U (out, q), S (q), V (q, in) train, q the rest

Gradients of U and V are projected off the frozen directions, so that new knowledge moves into what the base makes little use
of (continual learning). The change is U S V less what it was at the start, which is read off the base again and is in no file;
the decomposition is done in float32, as PEFT does it. It trains nearly as many numbers as the weight has, or more.
Nayak et al. 2025, arXiv 2504.07097.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Method, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError


def _rest(shape: Shape, spec: OSF) -> int:
    """q: how many triplets train."""
    smaller, kept = min(shape.out, shape.in_), spec.kept
    count = smaller // 2 if kept is None else int(smaller * kept) if isinstance(kept, float) else kept
    return smaller - count


@dataclass(frozen=True, kw_only=True)
class OSF(Method):
    """The options of OSF."""

    name = "osf"
    card = Card(
        title="OSF",
        formula="ΔW = U S V - U₀ S₀ V₀, the weak singular triplets of W",
        parameters=lambda shape, spec: _rest(shape, spec) * (shape.out + shape.in_ + 1),
        paper="arXiv 2504.07097",
        use="For task after task on one model, at the cost of full fine-tuning.",
        limits="At least one triplet is frozen and one trains.",
    )

    kept: int | float | None = option(
        None,
        "triplets that stay frozen: a count, or a share of the smaller side; null is half",
        above=0,
        allows=lambda kept: not isinstance(kept, float) or kept < 1,
        shown="a count of triplets, a share below 1, or None",
        peft="effective_rank",
        pattern="rank_pattern",
    )

    def check(self, shape: Shape, path: str) -> None:
        smaller = min(shape.out, shape.in_)
        if not 0 < _rest(shape, self) < smaller:
            raise LorakitError(
                f"attach: osf with kept={self.kept} freezes {smaller - _rest(shape, self)} of the {smaller} singular triplets "
                f"of {path}; 1 to {smaller - 1} can be frozen. Give it another by patterns, or leave the layer out."
            )


class OSFDelta(LowRank, of=OSF):
    """U, S and V of one matrix, their start, and the frozen directions."""

    def __init__(self, spec: OSF, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        q, kept = _rest(shape, spec), min(shape.out, shape.in_) - _rest(shape, spec)
        for letter, size in {"U": (shape.out, q), "S": (q,), "V": (q, shape.in_)}.items():
            setattr(self, letter, nn.Parameter(torch.zeros(size)))
            self.register_buffer(f"{letter}0", torch.zeros(size), persistent=False)
        self.register_buffer("U_frozen", torch.zeros(shape.out, kept), persistent=False)
        self.register_buffer("V_frozen", torch.zeros(kept, shape.in_), persistent=False)
        self.U: Tensor
        self.S: Tensor
        self.V: Tensor
        self.U0: Tensor
        self.S0: Tensor
        self.V0: Tensor
        self.U_frozen: Tensor
        self.V_frozen: Tensor

    def begin(self, W: Tensor) -> None:
        U, S, V = torch.linalg.svd(W.detach().float(), full_matrices=False)
        kept = self.U_frozen.shape[1]
        self.U_frozen.copy_(U[:, :kept])
        self.V_frozen.copy_(V[:kept])
        with torch.no_grad():
            for own, value in ((self.U, U[:, kept:]), (self.S, S[kept:]), (self.V, V[kept:])):
                own.copy_(value)
            for start, own in ((self.U0, self.U), (self.S0, self.S), (self.V0, self.V)):
                start.copy_(own)

    def factors(self) -> tuple[Tensor, Tensor]:
        # what is added is zero and its gradient projected
        U, V = self.U.detach(), self.V.detach()
        moved_U, moved_V = self.U - U, self.V - V
        U = U + moved_U - self.U_frozen @ (self.U_frozen.T @ moved_U)
        V = V + moved_V - (moved_V @ self.V_frozen.T) @ self.V_frozen
        return torch.cat([U * self.S, -self.U0 * self.S0], dim=1), torch.cat([V, self.V0])
