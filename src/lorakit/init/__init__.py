"""How a delta starts. Initialisers map what they need (nothing, weights, inputs, gradients) to factors.

They know no layer and no method: a low-rank delta takes the factors through `set_factors`.
"""

from __future__ import annotations

from lorakit.errors import LorakitError, unknown
from lorakit.init.corda import CorDA as CorDA
from lorakit.init.eva import EVA as EVA
from lorakit.init.initialiser import CalibrationRequest as CalibrationRequest
from lorakit.init.initialiser import Default as Default
from lorakit.init.initialiser import Factors as Factors
from lorakit.init.initialiser import Initialiser as Initialiser
from lorakit.init.initialiser import Measured as Measured
from lorakit.init.initialiser import Start as Start
from lorakit.init.initialiser import Statistic as Statistic
from lorakit.init.loftq import LoftQ as LoftQ
from lorakit.init.loraga import LoRAGA as LoRAGA
from lorakit.init.olora import OLoRA as OLoRA
from lorakit.init.pissa import MiLoRA as MiLoRA
from lorakit.init.pissa import PiSSA as PiSSA
from lorakit.init.random import Gaussian as Gaussian
from lorakit.init.random import Kaiming as Kaiming
from lorakit.init.random import Normal as Normal
from lorakit.init.random import Orthogonal as Orthogonal

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
