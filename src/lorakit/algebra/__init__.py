"""Arithmetic on what adapters add, written once over ΔW: merge, combine, cut, compare."""

from __future__ import annotations

from lorakit.algebra.merging import MergeReport, merge, merged

__all__ = ["MergeReport", "merge", "merged"]
