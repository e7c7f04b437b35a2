"""How several adapters become one: the table of recipes, and what `combine` can be told, which `lorakit combine` has as flags.

Nothing here imports torch, so that the command line's help need not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.core.options import option


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        text: for the command line, in one line.
        sparsify: which entries of each change stay: "" all, "largest", or "random".
        rescale: divide what stays by the density.
        consensus: leave out entries whose sign is not the elected one.
        mean: divide by the weights of those that agreed.
        measures: what data are measured for, to weigh the changes by ("inputs", "gradients"); "" nothing.
        result: "any"; "factors", which must all be there; or "cut" to a rank or an energy share.
    """

    text: str
    sparsify: str = ""
    rescale: bool = False
    consensus: bool = False
    mean: bool = False
    measures: str = ""
    result: str = "any"


RECIPES: dict[str, Recipe] = {
    "linear": Recipe("exact weighted sum (task arithmetic); negative weights subtract"),
    "cat": Recipe("the same sum with the factors side by side, at the sum of the ranks", result="factors"),
    "svd": Recipe("the same sum, reduced to --rank or --energy", result="cut"),
    "ties": Recipe(
        "keep the largest entries, elect one sign per entry, average those that agree",
        sparsify="largest",
        consensus=True,
        mean=True,
    ),
    "dare-linear": Recipe("keep random entries, rescale, sum", sparsify="random", rescale=True),
    "dare-ties": Recipe(
        "keep random entries, rescale, elect one sign per entry, average those that agree",
        sparsify="random",
        rescale=True,
        consensus=True,
        mean=True,
    ),
    "magnitude-prune": Recipe("keep the largest entries, sum", sparsify="largest"),
    "regmean": Recipe("match each adapter's outputs on its own data (needs --data)", measures="inputs"),
    "fisher": Recipe(
        "average weighted by squared gradients on each one's own data (needs --data)", measures="gradients"
    ),
}


@dataclass(frozen=True)
class Combination:
    """What is asked of `combine`, beside the adapters; `combining.py` checks it."""

    weights: tuple[float, ...] | None = option(None, "one weight per adapter, such as 0.7,0.3; by default 1/n each")
    how: str = option("linear", "recipe; --recipes describes each one")
    rank: int | None = option(None, "reduce every layer of the result to this rank", minimum=1)
    energy: float | None = option(
        None,
        "instead of --rank: keep this share of each layer's squared singular values",
        above=0,
        maximum=1,
    )
    density: float | None = option(
        None, "share of entries that ties, dare-* and magnitude-prune keep; 0.2 by default", above=0, maximum=1
    )
    factor: float = option(1.0, "scale of the result (λ of TIES and task arithmetic)")
    layer_weights: Mapping[str, tuple[float, ...]] = option(
        factory=dict, doc="per-layer weights, by name ending, such as q_proj=1,0; may be repeated"
    )
    seed: int = option(0, "random seed for DARE")

    @property
    def recipe(self) -> Recipe:
        """The row of the table."""
        return RECIPES[self.how]
