"""lorakit: low-rank adaptation of any torch model. The names that users need."""

from __future__ import annotations

from lorakit.adapter import Adapter, activate, adapters, attach, detach, use
from lorakit.algebra import merge, merged
from lorakit.errors import LorakitError
from lorakit.init import Gaussian, Kaiming, Normal
from lorakit.methods import METHODS, DoRA, LoRA, LoRAFA
from lorakit.store import load

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "DoRA",
    "Gaussian",
    "Kaiming",
    "LoRA",
    "LoRAFA",
    "LorakitError",
    "Normal",
    "__version__",
    "activate",
    "adapters",
    "attach",
    "detach",
    "load",
    "merge",
    "merged",
    "use",
]
