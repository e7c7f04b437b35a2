"""Routers over adapters and mixtures trained as one: who adds how much to which token. The table of their names."""

from __future__ import annotations

from lorakit.experts.arrow import Arrow
from lorakit.experts.ground import RouterSpec
from lorakit.experts.lorahub import LoRAHub
from lorakit.experts.retrieval import Retrieval

ROUTERS: dict[str, type[RouterSpec]] = {
    "arrow": Arrow,
    "lorahub": LoRAHub,
    "retrieval": Retrieval,
}

__all__ = ["ROUTERS", "Arrow", "LoRAHub", "Retrieval", "RouterSpec"]
