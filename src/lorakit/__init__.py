"""lorakit: low-rank adaptation of any torch model. The names that users need, each imported when it is first used.

Importing torch takes seconds; `lorakit --help` and tools that only ask for the version should not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapter import Adapter, adapters
    from lorakit.algebra import combine, diff, extract, merge, merged, prune, resize, scale, swap, verify
    from lorakit.attachment import attach, detach
    from lorakit.board import activate, noted, prompts, use
    from lorakit.conversion import convert
    from lorakit.edits import EDITS, Bottleneck, LLaMAAdapter, LoReFT, PrefixTuning, PromptTuning, PTuning
    from lorakit.errors import LorakitError
    from lorakit.experts import Arrow, LoRAHub, MixLoRA, MoLE, Retrieval, XLoRA
    from lorakit.init import EVA, CorDA, Gaussian, Kaiming, LoftQ, LoRAGA, MiLoRA, Normal, OLoRA, Orthogonal, PiSSA
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
    from lorakit.mixture import route
    from lorakit.store import load

__version__ = "0.1.0"

_HOMES = {
    "lorakit.adapter": ("Adapter", "adapters"),
    "lorakit.algebra": ("combine", "diff", "extract", "merge", "merged", "prune", "resize", "scale", "swap", "verify"),
    "lorakit.attachment": ("attach", "detach"),
    "lorakit.board": ("activate", "noted", "prompts", "use"),
    "lorakit.conversion": ("convert",),
    "lorakit.edits": ("EDITS", "Bottleneck", "LLaMAAdapter", "LoReFT", "PTuning", "PrefixTuning", "PromptTuning"),
    "lorakit.errors": ("LorakitError",),
    "lorakit.experts": ("Arrow", "LoRAHub", "MixLoRA", "MoLE", "Retrieval", "XLoRA"),
    "lorakit.init": (
        "EVA",
        "CorDA",
        "Gaussian",
        "Kaiming",
        "LoftQ",
        "LoRAGA",
        "MiLoRA",
        "Normal",
        "OLoRA",
        "Orthogonal",
        "PiSSA",
    ),
    "lorakit.methods": (
        "BOFT",
        "C3A",
        "IA3",
        "METHODS",
        "OFT",
        "AdaLoRA",
        "BitFit",
        "DoRA",
        "DyLoRA",
        "ElaLoRA",
        "FourierFT",
        "Full",
        "HiRA",
        "LoHa",
        "LoKr",
        "LoRA",
        "LoRAFA",
        "LoRAXS",
        "MoRA",
        "OneLoRA",
        "RandLoRA",
        "ReLoRA",
        "SHiRA",
        "TiedLoRA",
        "VBLoRA",
        "VeRA",
    ),
    "lorakit.mixture": ("route",),
    "lorakit.store": ("load",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "BOFT",
    "C3A",
    "EDITS",
    "EVA",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "Adapter",
    "Arrow",
    "BitFit",
    "Bottleneck",
    "CorDA",
    "DoRA",
    "DyLoRA",
    "ElaLoRA",
    "FourierFT",
    "Full",
    "Gaussian",
    "HiRA",
    "Kaiming",
    "LLaMAAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAGA",
    "LoRAHub",
    "LoRAXS",
    "LoReFT",
    "LoftQ",
    "LorakitError",
    "MiLoRA",
    "MixLoRA",
    "MoLE",
    "MoRA",
    "Normal",
    "OLoRA",
    "OneLoRA",
    "Orthogonal",
    "PTuning",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "ReLoRA",
    "Retrieval",
    "SHiRA",
    "TiedLoRA",
    "VBLoRA",
    "VeRA",
    "XLoRA",
    "__version__",
    "activate",
    "adapters",
    "attach",
    "combine",
    "convert",
    "detach",
    "diff",
    "extract",
    "load",
    "merge",
    "merged",
    "noted",
    "prompts",
    "prune",
    "resize",
    "route",
    "scale",
    "swap",
    "use",
    "verify",
]
