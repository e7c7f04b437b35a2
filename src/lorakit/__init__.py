"""lorakit: low-rank adaptation of any torch model. The names that users need."""

from __future__ import annotations

from lorakit.adapter import Adapter, activate, adapters, attach, detach, use
from lorakit.algebra import merge, merged
from lorakit.errors import LorakitError
from lorakit.init import Gaussian, Kaiming, Normal
from lorakit.methods import (
    BOFT,
    C3A,
    IA3,
    METHODS,
    OFT,
    AdaLoRA,
    BitFit,
    DoRA,
    DyLoRA,
    ElaLoRA,
    FourierFT,
    Full,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAXS,
    MoRA,
    OneLoRA,
    RandLoRA,
    ReLoRA,
    SHiRA,
    TiedLoRA,
    VBLoRA,
    VeRA,
)
from lorakit.resizing import resize
from lorakit.store import load

__version__ = "0.1.0"

__all__ = [
    "BOFT",
    "C3A",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "DoRA",
    "DyLoRA",
    "ElaLoRA",
    "FourierFT",
    "Full",
    "Gaussian",
    "HiRA",
    "Kaiming",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAXS",
    "LorakitError",
    "MoRA",
    "Normal",
    "OneLoRA",
    "RandLoRA",
    "ReLoRA",
    "SHiRA",
    "TiedLoRA",
    "VBLoRA",
    "VeRA",
    "__version__",
    "activate",
    "adapters",
    "attach",
    "detach",
    "load",
    "merge",
    "merged",
    "resize",
    "use",
]
