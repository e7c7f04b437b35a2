"""LoftQ: the base is quantised, and the adapter starts as the best low-rank answer to the error that this makes.

    L R = 0;  repeat:  Q = q(W - L R);  U S Vᵀ = svd(W - Q);  L = U_r √S_r,  R = √S_r V_rᵀ
    base = Q      B = L / √s      A = R / √s      so that W ≈ Q + s B A

q is the layer's own quantiser where the base is held in few bits (the floats are then handed to `attach` as
`originals`), and a simulated one on a float base. With `principal` the rounds begin at the r leading singular triplets
of W in place of zero, and the first Q answers those (QPiSSA, Meng et al. 2024, arXiv 2404.02948).

Li et al. 2023, arXiv 2310.08659. Three things differ from what is in use elsewhere, on purpose. The factors are divided
by √s: without that (the authors' stored adapters, PEFT) a scale other than 1 starts from Q + s L R. The best of all
rounds is kept: with scales taken anew in each round q is no projection, and the error may rise again. And the base is
replaced through its storage, with the original kept until the adapter is taken off.

This is the one start that changes the base: what is trained belongs to Q, so a saved adapter needs the model with Q.
With one round, Q = q(W) is what any loader makes of W in that format; with more, save the quantised model too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.core.options import option
from lorakit.core.spectrum import triplets
from lorakit.errors import unknown
from lorakit.init.initialiser import Factors, Initialiser, Start
from lorakit.init.quantiser import QUANTISERS


@dataclass(frozen=True, kw_only=True)
class LoftQ(Initialiser):
    """Quantise the base and start from its error."""

    name = "loftq"
    needs = "weight"
    rewrites = True
    rounds: int = option(
        1,
        "how often quantising and decomposing alternate; 1 leaves the base as any loader of the format has it",
        minimum=1,
    )
    quantiser: str = option("nf4", "number format that a float base is rounded to; a quantised base has its own")
    principal: bool = option(False, "begin at the weight's principal part, which the base then lacks (QPiSSA)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantiser not in QUANTISERS:
            raise unknown("quantiser", self.quantiser, QUANTISERS)

    def factors(self, start: Start) -> Factors:
        root = start.root_scale(self.name)
        quantise, W = start.stored or QUANTISERS[self.quantiser], start.W
        best: tuple[float, Factors] | None = None
        L, R = _halves(W, start.rank) if self.principal else (W[:, :0], W[:0])
        for turn in range(self.rounds):
            rest = W - L @ R
            Q = quantise(rest)
            if turn or not self.principal:
                L, R = _halves(W - Q, start.rank)
            error = float(torch.linalg.matrix_norm(W - Q - L @ R))
            if best is None or error < best[0]:
                # A layer of few bits rounds `rest` to Q by itself; Q once more would not give Q with double quantisation.
                best = (error, Factors(L / root, R / root, Q if start.stored is None else rest))
        assert best is not None
        return best[1]


def _halves(M: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The r leading triplets as L (out, r) and R (r, in), the singular values shared evenly."""
    U, S, V = triplets(M, rank)
    return U * S.sqrt(), (V * S.sqrt()).mT
