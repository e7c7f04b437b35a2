"""How a delta starts. Initialisers map what they need (nothing, weights, inputs, gradients) to factors.

They know no layer and no method: a low-rank delta takes the factors through `set_factors`.
"""

from __future__ import annotations

from lorakit.errors import LorakitError, unknown
from lorakit.init.corda import CorDA
from lorakit.init.eva import EVA
from lorakit.init.initialiser import Default, Factors, Initialiser, Measured, Start, Statistic
from lorakit.init.loftq import LoftQ
from lorakit.init.loraga import LoRAGA
from lorakit.init.olora import OLoRA
from lorakit.init.pissa import MiLoRA, PiSSA
from lorakit.init.random import Gaussian, Kaiming, Normal, Orthogonal

INITIALISERS: dict[str, type[Initialiser]] = {
    "default": Default,
    "kaiming": Kaiming,
    "gaussian": Gaussian,
    "normal": Normal,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "olora": OLoRA,
    "loftq": LoftQ,
    "eva": EVA,
    "corda": CorDA,
    "lora-ga": LoRAGA,
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


__all__ = [
    "EVA",
    "INITIALISERS",
    "CorDA",
    "Default",
    "Factors",
    "Gaussian",
    "Initialiser",
    "Kaiming",
    "LoRAGA",
    "LoftQ",
    "Measured",
    "MiLoRA",
    "Normal",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "Start",
    "Statistic",
    "initialiser",
]
