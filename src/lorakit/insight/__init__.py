"""What can be known before, beside and after training: what it will take, here."""

from __future__ import annotations

from lorakit.insight.plan import WAYS, Plan, activations, outline, plan

__all__ = ["WAYS", "Plan", "activations", "outline", "plan"]
