"""How an adapter's parameters are optimised: groups by role. Knows parameters and roles, never methods."""

from __future__ import annotations

from lorakit.optim.groups import parameter_groups

__all__ = ["parameter_groups"]
