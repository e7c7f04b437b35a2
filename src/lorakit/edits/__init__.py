"""The edits by name, for files and command lines. One edit is one file and one row here."""

from __future__ import annotations

from lorakit.edits.bottleneck import Bottleneck
from lorakit.edits.contract import EditMethod
from lorakit.edits.llamaadapter import LLaMAAdapter
from lorakit.edits.loreft import LoReFT
from lorakit.edits.prefix import PrefixTuning
from lorakit.edits.prompt import PromptTuning
from lorakit.edits.ptuning import PTuning

EDITS: dict[str, type[EditMethod]] = {
    "bottleneck": Bottleneck,
    "prompt-tuning": PromptTuning,
    "p-tuning": PTuning,
    "prefix-tuning": PrefixTuning,
    "llama-adapter": LLaMAAdapter,
    "loreft": LoReFT,
}

__all__ = [
    "EDITS",
    "Bottleneck",
    "LLaMAAdapter",
    "LoReFT",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
]
