"""LoftQ: the base is quantised, and the adapter starts as the best low-rank answer to the error that this makes.

    L R = 0;  repeat:  Q = q(W - L R);  U S Vᵀ = svd(W - Q);  L = U_r √S_r,  R = √S_r V_rᵀ
    base = Q      B = L / √s      A = R / √s      so that W ≈ Q + s B A

Li et al. 2023, arXiv 2310.08659. Three things differ from what is in use elsewhere, on purpose. The factors are divided
by √s: without that (the authors' stored adapters, PEFT) a scale other than 1 starts from Q + s L R. The best of all
rounds is kept: with scales taken anew in each round the error may rise again. And the base is replaced through its
storage, with the original kept until the adapter is taken off.

This is the one start that changes the base: what is trained belongs to Q, so a saved adapter needs the model with Q.
With one round, Q = q(W) is what any loader makes of W in that format; with more, save the quantised model too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorakit.errors import LorakitError, unknown
from lorakit.init.decomposition import triplets
from lorakit.init.initialiser import Factors, Initialiser, Needs, Start
from lorakit.init.quantiser import QUANTISERS


@dataclass(frozen=True, kw_only=True)
class LoftQ(Initialiser):
    """Quantise the base and start from its error.

    Attributes:
        rounds: how often quantising and decomposing alternate; 1 leaves the base as any loader of the format has it.
        quantiser: the number format of the base, by name.
    """

    name: ClassVar[str] = "loftq"
    needs: ClassVar[Needs] = "weight"
    rewrites: ClassVar[bool] = True
    rounds: int = 1
    quantiser: str = "nf4"

    def __post_init__(self) -> None:
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise LorakitError(f"init loftq: rounds was given as {self.rounds!r}; it is an integer of at least 1.")
        if self.quantiser not in QUANTISERS:
            raise unknown("quantiser", self.quantiser, QUANTISERS)

    def factors(self, start: Start) -> Factors:
        root = start.root_scale(self.name)
        quantise, W = QUANTISERS[self.quantiser], start.W
        best: tuple[float, Factors] | None = None
        answer = torch.zeros_like(W)
        for _ in range(self.rounds):
            Q = quantise(W - answer)
            U, S, V = triplets(W - Q, start.rank)
            L, R = U * S.sqrt(), (V * S.sqrt()).mT
            answer = L @ R
            error = float(torch.linalg.matrix_norm(W - Q - answer))
            if best is None or error < best[0]:
                best = (error, Factors(L / root, R / root, Q))
        assert best is not None
        return best[1]
