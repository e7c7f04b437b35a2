"""How the factors of one matrix are called in a file, by the ends of their names: PEFT's words, known here alone."""

from __future__ import annotations

from collections.abc import Mapping

PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
"""A LoRA's: A -> B."""
TRIPLETS = {".lora_A": ".lora_B"}
"""AdaLoRA's A -> B, between which stands `DIAGONAL`."""
DIAGONAL = ".lora_E"
WHOLE = ".full_P"
"""The end of a change that has no factors."""


def pair_of(key: str, pairs: Mapping[str, str] = PAIRS) -> tuple[str, str, str] | None:
    """`(stem, A's name, B's name)` for the name of either factor; None for other names."""
    for ending_A, ending_B in pairs.items():
        for ending in (ending_A, ending_B):
            if key.endswith(ending):
                stem = key.removesuffix(ending)
                return stem, stem + ending_A, stem + ending_B
    return None
