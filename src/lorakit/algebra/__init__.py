"""Arithmetic on what adapters add, written once over ΔW: merge, combine, cut, compare."""

from __future__ import annotations

from lorakit.algebra.combining import combine, scale
from lorakit.algebra.comparison import diff
from lorakit.algebra.extraction import extract
from lorakit.algebra.merging import MergeReport, merge, merged
from lorakit.algebra.pruning import prune
from lorakit.algebra.resizing import resize
from lorakit.algebra.swapping import swap
from lorakit.algebra.verification import verify

__all__ = [
    "MergeReport",
    "combine",
    "diff",
    "extract",
    "merge",
    "merged",
    "prune",
    "resize",
    "scale",
    "swap",
    "verify",
]
