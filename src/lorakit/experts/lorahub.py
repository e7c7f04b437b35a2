"""LoRAHub: one weight per adapter, found by a search without gradients on a few examples of a new task.

    ΔW = Σ_e w_e ΔW_e,   w = argmin  loss(examples, w) + penalty · Σ_e |w_e|,   |w_e| <= bound

The paper sums the factors (its ΔW is (Σ w B)(Σ w A), with products of one adapter's B and another's A in it, and so works
for equal ranks alone); here it is the changes themselves that are summed, so that any methods mix, and the found weights
may be given to `lk.use` or `lk.combine`. The search is CMA-ES as Hansen describes it (arXiv 1604.00772), from zero.
Huang et al. 2023, arXiv 2307.13269.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorakit.core.delta import Call, Card
from lorakit.core.options import option
from lorakit.core.using import routed
from lorakit.errors import LorakitError
from lorakit.experts.context import Examples, OverAdapters, RouterContext, RouterSpec
from lorakit.models.evaluating import evaluating


@dataclass(frozen=True, kw_only=True)
class LoRAHub(RouterSpec):
    """The options of LoRAHub."""

    name = "lorahub"
    card = Card(
        title="LoRAHub",
        formula="ΔW = Σ w_e ΔW_e, w by a search without gradients on a few examples",
        parameters=lambda shape, spec: 0,
        paper="arXiv 2307.13269",
        use="A new task with a handful of examples, and adapters of related tasks.",
        limits="One weight for all tokens and layers.",
    )
    evaluations: int = option(80, "how often the loss of the examples is computed; 40 in the paper", minimum=1)
    penalty: float = option(0.05, "weight of Σ |w| beside the loss")
    bound: float = option(1.5, "largest weight, either sign", above=0)
    spread: float = option(0.3, "standard deviation of the first weights that are tried", above=0)
    seed: int = option(0, "random seed of the search")


class Blended(OverAdapters, of=LoRAHub):
    """The same weights everywhere; zero until they are found."""

    def __init__(self, spec: LoRAHub, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.spec = spec
        self.register_buffer("w", torch.zeros(len(self.members), dtype=torch.float64))
        self.losses: list[float] = []
        """The objective of every trial of the search."""

    def blend(self) -> dict[str, float]:
        """The weights by adapter, as `lk.use` and `lk.combine` take them."""
        return dict(zip(self.members, cast(Tensor, self.w).tolist(), strict=True))

    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        return cast(Tensor, self.w)

    def fit(self, context: RouterContext, examples: Any) -> None:
        batches = _batches(examples)
        spec = self.spec

        def objective(w: Tensor) -> float:
            with routed(context.state, dict(zip(self.members, w.tolist(), strict=True))):
                losses = [float(cast(Any, context.model)(**batch).loss) for batch in batches]
            value = sum(losses) / len(losses) + spec.penalty * float(w.abs().sum())
            self.losses.append(value)
            return value

        with evaluating(context.model):
            best = search(
                objective,
                len(self.members),
                evaluations=spec.evaluations,
                bound=spec.bound,
                spread=spec.spread,
                seed=spec.seed,
            )
        cast(Tensor, self.w).copy_(best)


def _batches(examples: Any) -> Examples:
    batches = list(examples) if examples is not None and not isinstance(examples, dict) else []
    if not batches or not all(isinstance(batch, dict) and "labels" in batch for batch in batches):
        raise LorakitError(
            "route: lorahub searches its weights on a few examples; give batches=[...], each the arguments of one "
            "model(**batch), labels among them."
        )
    return batches


def search(
    objective: Callable[[Tensor], float],
    size: int,
    *,
    evaluations: int,
    bound: float,
    spread: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """The best point (size,) found for an objective by CMA-ES, from zero, within ±bound; zero itself is tried first."""
    n, generator = size, torch.Generator().manual_seed(seed)
    count = 4 + int(3 * math.log(n)) if n > 1 else 4
    keep = count // 2
    rank_weights = torch.log(torch.tensor(keep + 0.5)) - torch.arange(1, keep + 1).log()
    rank_weights = (rank_weights / rank_weights.sum()).double()
    effective = float(1 / rank_weights.square().sum())
    c_sigma = (effective + 2) / (n + effective + 5)
    damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (n + 1)) - 1) + c_sigma
    c_path = (4 + effective / n) / (n + 4 + 2 * effective / n)
    c_one = 2 / ((n + 1.3) ** 2 + effective)
    c_many = min(1 - c_one, 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective))
    expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

    mean, sigma = torch.zeros(n, dtype=torch.float64), spread
    C = torch.eye(n, dtype=torch.float64)
    path_sigma, path = torch.zeros_like(mean), torch.zeros_like(mean)
    best, least, asked, generation = mean.clone(), objective(mean), 1, 0
    while asked < evaluations:
        generation += 1
        values, Q = torch.linalg.eigh(C)
        root = values.clamp_min(1e-20).sqrt()
        draws = torch.randn(min(count, evaluations - asked), n, dtype=torch.float64, generator=generator)
        steps = draws * root @ Q.T
        points = (mean + sigma * steps).clamp(-bound, bound)
        found = torch.tensor([objective(point) for point in points], dtype=torch.float64)
        asked += len(points)
        order = found.argsort(stable=True)
        if float(found[order[0]]) < least:
            best, least = points[order[0]].clone(), float(found[order[0]])
        if len(points) < count:
            break
        steps = ((points - mean) / sigma)[order[:keep]]
        move = rank_weights @ steps
        mean = mean + sigma * move
        path_sigma = (1 - c_sigma) * path_sigma + math.sqrt(c_sigma * (2 - c_sigma) * effective) * (
            Q @ ((Q.T @ move) / root)
        )
        length = float(path_sigma.norm())
        steady = length / math.sqrt(1 - (1 - c_sigma) ** (2 * generation)) < (1.4 + 2 / (n + 1)) * expected
        path = (1 - c_path) * path + steady * math.sqrt(c_path * (2 - c_path) * effective) * move
        C = (
            (1 - c_one - c_many) * C
            + c_one * (torch.outer(path, path) + (not steady) * c_path * (2 - c_path) * C)
            + c_many * (steps.T * rank_weights) @ steps
        )
        sigma = min(sigma * math.exp((c_sigma / damping) * (length / expected - 1)), 4 * bound)
    return best
