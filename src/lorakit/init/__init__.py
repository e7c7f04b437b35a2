"""How a delta starts. Initialisers map what they need (nothing, weights, inputs, gradients) to factors.

They know no layer and no method: a low-rank delta takes the factors through `set_factors`.
"""

from __future__ import annotations

from lorakit.errors import LorakitError, unknown
from lorakit.init.initialiser import Default, Initialiser
from lorakit.init.random import Gaussian, Kaiming, Normal

INITIALISERS: dict[str, type[Initialiser]] = {
    "default": Default,
    "kaiming": Kaiming,
    "gaussian": Gaussian,
    "normal": Normal,
}


def initialiser(given: str | Initialiser) -> Initialiser:
    """The initialiser of this name with its default options, or the one given."""
    if isinstance(given, Initialiser):
        return given
    if not isinstance(given, str):
        raise LorakitError(
            f"attach: init was given as {given!r}; it is one of {', '.join(INITIALISERS)}, or an Initialiser."
        )
    if given not in INITIALISERS:
        raise unknown("init", given, INITIALISERS)
    return INITIALISERS[given]()


__all__ = ["INITIALISERS", "Default", "Gaussian", "Initialiser", "Kaiming", "Normal", "initialiser"]
