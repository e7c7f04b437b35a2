"""LN-tuning: the norms of a model train whole, and nothing else does.

    y = norm(x) ⊙ g + b          g and b (features,) are the adapter's own, which start as the base's

What is named in target_modules is trained whole, as by modules_to_save; by default (a preset) that is every norm of the model.
A norm sees every feature of every token and has few numbers: SmolLM2-135M has 61 norms of 576, 35,136 in all. There is no
matrix in it to add to; merging puts the trained numbers in place of the base's. Zhao et al. 2023, arXiv 2312.11420.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.core.delta import Card, Method


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """LN-tuning has no options."""

    name = "ln-tuning"
    whole = True
    card = Card(
        title="LN-tuning",
        formula="the norms' own g and b",
        parameters=lambda shape, spec: 0,
        paper="arXiv 2312.11420",
        use="When the adapter must be tiny and the model has no biases.",
        limits="It changes no matrix; norms are its layers.",
    )
