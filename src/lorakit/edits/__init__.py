"""The edits by name, for files and command lines. One edit is one file and one row here."""

from __future__ import annotations

from lorakit.edit import EditMethod
from lorakit.edits.prompt import PromptTuning

EDITS: dict[str, type[EditMethod]] = {
    "prompt-tuning": PromptTuning,
}

__all__ = [
    "EDITS",
    "PromptTuning",
]
