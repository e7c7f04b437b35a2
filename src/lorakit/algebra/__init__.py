"""Arithmetic on what adapters add, written once over ΔW: merge, combine, cut, compare."""
