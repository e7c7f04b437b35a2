"""EVA: A starts as the directions in which a layer's inputs vary most, and rank goes where they explain most.

    A = top right singular vectors of the inputs X (tokens, in)      B = 0

Paischer et al. 2024, arXiv 2410.07170. The vectors come from an incremental decomposition, one batch at a time, until
every direction that is needed has stopped turning. With `rho` above 1 the sum of the ranks stays, and each layer gets as
many as its directions' shares of the variance earn among all layers'; the scale of each layer stays too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.delta import Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.init.initialiser import Factors, Initialiser, Measured, Start


class IncrementalPCA:
    """The leading principal components of all rows seen, from the components so far and the new rows alone.

    The stack [S Vᵀ; X - mean; √(n m / (n + m)) (old mean - mean)] has the same scatter as all rows together, as long as
    nothing was cut off before.

    Attributes:
        S: singular values, descending, (components,).
        V: components as rows, (components, in).
        total: the scatter of all rows: the sum of all squared singular values, the dropped ones too.
        turned: |cosine| of each component with itself before the last batch.
    """

    def __init__(self, components: int, centred: bool = True) -> None:
        self.components, self.centred = components, centred
        self.count = 0
        self.mean: Tensor | None = None
        self.S, self.V, self.turned = torch.zeros(0), torch.zeros(0, 0), torch.zeros(0)
        self.total = 0.0

    def add(self, samples: Sequence[Tensor]) -> None:
        X = torch.cat(list(samples))
        if not len(X):
            return
        mean = X.mean(0) if self.centred else X.new_zeros(X.shape[1])
        stack = [X - mean]
        if self.mean is not None:
            weight = math.sqrt(self.count * len(X) / (self.count + len(X)))
            stack += [self.S[:, None] * self.V, (weight * (self.mean - mean))[None]]
            mean = self.mean + (mean - self.mean) * (len(X) / (self.count + len(X)))
        self.total += float(stack[0].square().sum()) + (float(stack[2].square().sum()) if len(stack) > 1 else 0.0)
        _, S, V = torch.linalg.svd(torch.cat(stack), full_matrices=False)
        S, V = S[: self.components], V[: self.components]
        if len(self.V):
            both = min(len(V), len(self.V))
            self.turned = torch.zeros(len(V))
            self.turned[:both] = (V[:both] * self.V[:both]).sum(1).abs().float().cpu()
        self.count, self.mean, self.S, self.V = self.count + len(X), mean, S, V

    @property
    def shares(self) -> list[float]:
        """The share of each component in the total variance, descending."""
        return [] if self.total == 0 else (self.S.double().square() / self.total).tolist()

    def still(self, count: int, cosine: float) -> bool:
        """Whether the first `count` components have stopped turning."""
        return len(self.turned) >= count and bool((self.turned[:count] > cosine).all())


@dataclass(frozen=True, kw_only=True)
class EVA(Initialiser):
    """The principal directions of a layer's inputs."""

    name = "eva"
    needs = "inputs"
    rho: float = option(
        2.0,
        "how many times its rank a layer may get at most when ranks are redistributed; 1 leaves all ranks",
        minimum=1,
    )
    cosine: float = option(
        0.99,
        "a direction counts as found when its cosine with itself one batch before is above this",
        above=0,
        maximum=1,
    )
    whiten: bool = option(False, "divide each direction by the root of its singular value")
    centred: bool = option(True, "take the mean off the inputs first, as PEFT does")
    labelled: bool = option(True, "leave out positions without a label (prompts), where batches have labels")
    examples: int = option(256, "training examples that a run measures on", minimum=1)

    @property
    def completions(self) -> bool:  # type: ignore[override]
        return self.labelled

    @property
    def redistributes(self) -> bool:  # type: ignore[override]
        return self.rho > 1

    def _components(self, shape: Shape, rank: int) -> int:
        return min(math.ceil(self.rho * rank), shape.in_)

    def statistic(self, shape: Shape, rank: int) -> IncrementalPCA:
        return IncrementalPCA(self._components(shape, rank), self.centred)

    def numbers(self, shape: Shape, rank: int) -> int:
        return (self._components(shape, rank) + 1) * shape.in_

    def settled(self, matrices: Mapping[str, Measured]) -> bool:
        wanted = self.ranks(matrices)
        return all(matrix.statistic.still(wanted[path], self.cosine) for path, matrix in matrices.items())

    def ranks(self, matrices: Mapping[str, Measured]) -> dict[str, int]:
        if not self.redistributes:
            return super().ranks(matrices)
        budget = sum(matrix.rank for matrix in matrices.values())
        shares = []
        for path, matrix in matrices.items():
            # No more than the layer's own size, whatever its inputs would earn.
            most = min(math.ceil(self.rho * matrix.rank), matrix.shape.out, matrix.shape.in_)
            shares += [(-share, index, path) for index, share in enumerate(matrix.statistic.shares[:most])]
        ranks = dict.fromkeys(matrices, 0)
        for _, _, path in sorted(shares)[:budget]:  # equal shares (q, k and v have the same inputs) go by name
            ranks[path] += 1
        return ranks

    def factors(self, start: Start) -> Factors:
        found: IncrementalPCA = start.statistic
        if len(found.S) < start.rank:
            raise LorakitError(
                f"attach: init='eva' needs {start.rank} directions for {start.path}, and the batches gave {found.count} tokens "
                f"there, which have {len(found.S)}. Give more batches, or a smaller rank."
            )
        A = found.V[: start.rank]
        if self.whiten:
            A = A / found.S[: start.rank, None].sqrt()
        return Factors(start.zeros(start.shape.out, start.rank), A)
