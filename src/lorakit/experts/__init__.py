"""Routers over adapters and mixtures trained as one: who adds how much to which token. The tables of their names."""

from __future__ import annotations

from lorakit.core.delta import Method
from lorakit.experts.alora import ALoRA
from lorakit.experts.arrow import Arrow
from lorakit.experts.context import MEMBERS, RouterSpec
from lorakit.experts.lorahub import LoRAHub
from lorakit.experts.mixlora import MixLoRA
from lorakit.experts.mole import MoLE
from lorakit.experts.retrieval import Retrieval
from lorakit.experts.xlora import XLoRA

ROUTERS: dict[str, type[RouterSpec]] = {
    "arrow": Arrow,
    "lorahub": LoRAHub,
    "mole": MoLE,
    "retrieval": Retrieval,
    "xlora": XLoRA,
}
"""Routers over adapters that are on the model."""

MIXTURES: dict[str, type[Method]] = {"mixlora": MixLoRA, "alora": ALoRA}
"""Methods that weigh what they add token by token."""

__all__ = [
    "MEMBERS",
    "MIXTURES",
    "ROUTERS",
    "ALoRA",
    "Arrow",
    "LoRAHub",
    "MixLoRA",
    "MoLE",
    "Retrieval",
    "RouterSpec",
    "XLoRA",
]
