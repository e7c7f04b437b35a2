"""ElaLoRA: AdaLoRA's form with ranks that move from layer to layer, at a constant total.

    ΔW = s P diag(λ) Q          P (out, rank), λ (rank,), Q (rank, in), s = alpha / rank at the start

Every `interval` steps each layer names its weakest triplets; the weakest of all are taken away, and as many new ones go
to the layers whose weakest are strongest. Matrices are really smaller and larger afterwards, and the optimiser's state
follows. The number that move falls from `moves` to 0 towards the end. Chang et al. 2025, arXiv 2504.00254.

A new triplet has λ = 0 and directions orthogonal to those that are there (by projecting on an orthonormal basis, since a
penalty alone does not make rows orthonormal), so adding it changes nothing. A layer that would both lose and gain keeps
what it has. PEFT lacks the method; its files are AdaLoRA's, which PEFT reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.methods.adalora import TripletOptions


@dataclass(frozen=True, kw_only=True)
class ElaLoRA(TripletOptions):
    """The options of ElaLoRA."""

    name = "elalora"
    schedule = "exchange"
    card = Card(
        title="ElaLoRA",
        formula="ΔW = s P diag(λ) Q, s = alpha / rank at the start; ranks move between layers",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_ + 1),
        paper="arXiv 2504.00254",
        use="When layers differ in what they need and the size is fixed from the start.",
        limits="The rank is at most the smaller side of the matrix.",
    )

    moves: int = option(4, "triplets that change their layer at the first change; fewer at later ones", minimum=1)
    candidates: int = option(2, "weakest triplets that each layer offers at a change", minimum=1)
