"""LLaMA-Adapter: trained tokens that the top layers look at in a softmax of their own, through a gate that starts closed.

    softmax(q Kᵀ s) V + tanh(g) ⊙ softmax(q (W_k P)ᵀ s) W_v P        then the attention's output projection

P (tokens, hidden) in each of the top layers, through the layer's own W_k and W_v and without a position; g one number per
head, zero at the start, so that the model begins as its base and the first step moves g alone. PEFT has one gate per layer
without tanh (gate="layer"), which is another parametrisation: files with it go both ways for Llama and Mistral. 10 tokens in
28 layers of width 576 and 9 heads train 161,532 numbers. Zhang et al. 2023, arXiv 2303.16199.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.edits.contract import Anatomy, Attention, EditMethod, Place, attention_places, in_blocks
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(EditMethod):
    """The options of LLaMA-Adapter."""

    name = "llama-adapter"
    reason = "its keys have a softmax of their own"
    card = Card(
        title="LLaMA-Adapter",
        formula="Attn(q, K, V) + tanh(g) ⊙ Attn(q, W_k P, W_v P)",
        parameters=lambda anatomy, spec: (
            len(spec.places(anatomy, None))
            * (spec.tokens * anatomy.hidden + (anatomy.heads if spec.gate == "head" else 1))
        ),
        paper="arXiv 2303.16199",
        use="Instruction tuning with a few numbers that starts exactly at the base.",
    )

    tokens: int = option(10, "trained tokens per layer", minimum=1, peft="adapter_len")
    top: int | None = option(
        None, "in how many of the top layers; all but the lowest two by default, as in the paper", peft="adapter_layers"
    )
    gate: Literal["head", "layer"] = option(
        "head", "head: a gate per head within tanh; layer: one number per layer as it is, which is PEFT's form"
    )

    def places(self, anatomy: Anatomy, layers: Sequence[int] | None) -> list[Place]:
        blocks = in_blocks(anatomy.key_blocks, layers, self.name)
        if layers is None:
            top = max(1, len(blocks) - 2) if self.top is None else self.top
            if not 1 <= top <= len(blocks):
                raise LorakitError(f"attach: top was given as {self.top!r}; this model has {len(blocks)} layers.")
            blocks = blocks[-top:]
        elif self.top is not None:
            raise LorakitError("attach: llama-adapter was given both layers and top; keep one.")
        return attention_places(blocks, self.name)

    def build(self, place: Place, anatomy: Anatomy, folded: bool = False) -> GatedTokens:
        return GatedTokens(self, place, anatomy)


class GatedTokens(Attention):
    """P (tokens, hidden) and g (heads,), or (1,) for the whole layer."""

    joint = False

    def __init__(self, spec: LLaMAAdapter, place: Place, anatomy: Anatomy) -> None:
        super().__init__(spec, place)
        self.P = nn.Parameter(torch.randn(spec.tokens, anatomy.hidden))
        self.g = nn.Parameter(torch.zeros(anatomy.heads if spec.gate == "head" else 1))
        self.squashed = spec.gate == "head"

    def keys_values(self, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return project(self.P)

    def gate(self) -> Tensor:
        return torch.tanh(self.g) if self.squashed else self.g
