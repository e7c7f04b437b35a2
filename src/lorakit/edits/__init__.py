"""The edits by name, for files and command lines. One edit is one file and one row here."""

from __future__ import annotations

from lorakit.edits.bottleneck import Bottleneck as Bottleneck
from lorakit.edits.contract import EditMethod
from lorakit.edits.llamaadapter import LLaMAAdapter as LLaMAAdapter
from lorakit.edits.loreft import LoReFT as LoReFT
from lorakit.edits.prefix import PrefixTuning as PrefixTuning
from lorakit.edits.prompt import PromptTuning as PromptTuning
from lorakit.edits.ptuning import PTuning as PTuning

EDITS: dict[str, type[EditMethod]] = {
    "bottleneck": Bottleneck,
    "prompt-tuning": PromptTuning,
    "p-tuning": PTuning,
    "prefix-tuning": PrefixTuning,
    "llama-adapter": LLaMAAdapter,
    "loreft": LoReFT,
}
