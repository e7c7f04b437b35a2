"""What each adapter's own data say about every matrix, and merging by it: regression (RegMean), and Fisher information.

    RegMean   ΔW = Σ wᵢ ΔWᵢ Gᵢ (Σ wᵢ Gᵢ)⁻¹      Gᵢ = mean of x xᵀ over the inputs x of the matrix
    Fisher    ΔW = Σ wᵢ Fᵢ ⊙ ΔWᵢ / Σ wᵢ Fᵢ      Fᵢ = mean of (∂L/∂W)² over batches, entry by entry

Both are measured while adapter i alone acts, on data of its own. RegMean's ΔW is the one whose outputs differ least from
each adapter's on that adapter's inputs, Σ wᵢ mean ‖(ΔW - ΔWᵢ) x‖²; it has factors where all the ΔWᵢ have, at the sum of
the ranks. As in the paper, what is not on the diagonal of G is multiplied by 0.9, and where no input ever has a direction
nothing is added for it. Jin et al. 2023, arXiv 2212.09849.

Fisher's ΔW has no factors. The gradients are those of the batches' labels (the empirical Fisher information), and each batch
counts as one example: batches of one row are what the paper has. Matena and Raffel 2022, arXiv 2111.09832.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.algebra.changes import Change, total
from lorakit.algebra.sources import Live
from lorakit.core.delta import Shape
from lorakit.errors import LorakitError
from lorakit.init import CalibrationRequest
from lorakit.init.calibration import BUDGET, Batch, Matrix, calibrate, in_budget


class Gram:
    """The mean of x xᵀ over all inputs x, (in, in) in float32 or better."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None

    def add(self, samples: Sequence[Tensor]) -> None:
        for X in samples:
            G = X.mT @ X
            self.sum = G if self.sum is None else self.sum.add_(G)
            self.count += len(X)

    def mean(self) -> Tensor:
        """G, in float64."""
        assert self.sum is not None
        return self.sum.double() / self.count


@dataclass(frozen=True)
class Importance(CalibrationRequest, ABC):
    """One way to weigh changes by what is measured.

    Attributes:
        recipe: the name of the recipe that asks for it.
    """

    recipe: str

    @property
    def request(self) -> str:
        return f"combine: {self.recipe!r}"

    @property
    def otherwise(self) -> str:
        return '"linear" and the other recipes measure nothing.'

    @abstractmethod
    def merged(self, changes: Sequence[Change | None], found: Sequence[Any], weights: Sequence[float]) -> Change:
        """The merged change of one matrix. Where an adapter has no change for it (None), it wants the base as it is."""


class RegMean(Importance):
    """By the second moments of inputs."""

    needs = "inputs"
    off_diagonal = 0.9
    """What entries of G off its diagonal are multiplied by."""

    def statistic(self, shape: Shape, rank: int) -> Gram:
        return Gram()

    def numbers(self, shape: Shape, rank: int) -> int:
        return shape.in_ * shape.in_

    def merged(self, changes: Sequence[Change | None], found: Sequence[Any], weights: Sequence[float]) -> Change:
        moments = [self._damped(gram.mean()) for gram in found]
        whole = torch.stack([w * G for w, G in zip(weights, moments, strict=True)]).sum(0)
        turned, own = [], []
        for change, G, weight in zip(changes, moments, weights, strict=True):
            if change is None:
                continue
            right = change.B if change.A is None else change.A
            right = divided(right @ G.to(right.device), whole.to(right.device))
            turned.append(Change(right) if change.A is None else Change(change.B, right))
            own.append(weight)
        return total(turned, own)

    def _damped(self, G: Tensor) -> Tensor:
        return self.off_diagonal * G + (1 - self.off_diagonal) * torch.diag(G.diagonal())


def divided(X: Tensor, G: Tensor) -> Tensor:
    """X G⁻¹ for a symmetric G without negative eigenvalues, in float64; where G has no inverse, the solution that is zero in
    the directions that G lacks."""
    L, failed = torch.linalg.cholesky_ex(G)
    if failed:
        inverse: Tensor = torch.linalg.pinv(G, hermitian=True)
        return X @ inverse
    solved: Tensor = torch.cholesky_solve(X.mT, L)
    return solved.mT


class Fisher(Importance):
    """By the squares of gradients."""

    needs = "gradients"
    squares = True

    def numbers(self, shape: Shape, rank: int) -> int:
        return 2 * shape.out * shape.in_  # the sum, and the gradient of one batch

    def merged(self, changes: Sequence[Change | None], found: Sequence[Any], weights: Sequence[float]) -> Change:
        there = next(change for change in changes if change is not None)
        above, below, plain = (torch.zeros(there.shape, dtype=torch.float64, device=there.B.device) for _ in range(3))
        for change, F, weight in zip(changes, found, weights, strict=True):
            F = F.to(above)
            below += weight * F
            if change is not None:
                tau = change.dense()
                above += weight * F * tau
                plain += weight / sum(weights) * tau
        return Change(torch.where(below > 0, above / below, plain))  # where nothing has a say, the mean


IMPORTANCES: dict[str, type[Importance]] = {"inputs": RegMean, "gradients": Fisher}
"""What a recipe measures -> how."""


class Findings:
    """What is measured of several adapters on one model, each on its own batches; for as many matrices at a time as a budget
    of memory allows, when one of them is asked for.

    Args:
        importance: what to measure.
        given: the adapters.
        batches: for each of them its batches.
        budget: bytes.

    Raises:
        LorakitError: the batches are not one list for each adapter.
    """

    def __init__(
        self,
        importance: Importance,
        given: Sequence[Live],
        batches: Sequence[Iterable[Batch]] | None,
        budget: int = BUDGET,
    ) -> None:
        ask = f"{importance.request} measures each adapter on its own data: give batches=[[…], […]], for each of the "
        ask += f"{len(given)} adapters a list of batches, and each batch the arguments of one model(**batch)"
        if batches is None:
            raise LorakitError(f"{ask}.")
        if isinstance(batches, Mapping | Tensor | str) or len(batches) != len(given):
            held = type(batches).__name__ if isinstance(batches, Mapping | Tensor | str) else f"{len(batches)} of them"
            raise LorakitError(f"{ask}; given: {held}.")
        self.importance, self.given = importance, given
        self.batches = [own if isinstance(own, Mapping) else list(own) for own in batches]
        self.budget = budget
        self.matrices: dict[str, Matrix] = {}
        for one in given:
            for place, (path, site, _) in one.at.items():
                self.matrices.setdefault(place, Matrix(one.adapter.layers[path], site, rank=1, scale=1.0))
        sizes = {
            place: 4 * len(given) * importance.numbers(matrix.site.layout.shape, 1)
            for place, matrix in self.matrices.items()
        }
        self._runs = in_budget(sizes, budget)
        self._held: list[dict[str, Any]] = []

    def at(self, place: str) -> list[Any]:
        """What was found of one matrix, for each adapter."""
        if not self._held or place not in self._held[0]:
            self._held = []  # let go of before the next ones are made
            run = next(run for run in self._runs if place in run)
            matrices = {name: self.matrices[name] for name in run}
            for one, batches in zip(self.given, self.batches, strict=True):
                found = calibrate(
                    one.adapter.model, matrices, self.importance, batches, self.budget, route=one.adapter.name
                )
                self._held.append(dict(found))
        return [held[place] for held in self._held]
