"""Prefix tuning: trained keys and values to the left of a layer's own, in the same softmax.

    softmax(q [P_K; K]ᵀ s) [P_V; V] = λ Attn(q, P) + (1 - λ) Attn(q, K, V)        λ: the prefix's share of the softmax

P_K, P_V (tokens, key heads, head size) in every layer. They train through a network ("width": E → Linear, tanh, Linear; the
paper's 512), which is evaluated once and dropped when the adapter is saved, or directly (width=None: P-tuning v2, arXiv
2110.07602). A prefix has no position of its own, and the text's positions start behind it, as with a cache that was there
before. A prefix of zeros is not the base: its scores of 0 take their share. In an encoder-decoder the decoder's own
attention gets it, as PEFT has it (the paper also the other two). 20 tokens of SmolLM2's 30 layers store 230,400 numbers. Li
and Liang 2021, arXiv 2101.00190.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card
from lorakit.core.options import option
from lorakit.edits.contract import Anatomy, Attention, Edit, EditMethod, Place, attention_places
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(EditMethod):
    """The options of prefix tuning."""

    name = "prefix-tuning"
    blends = False
    family = "prefix"
    reason = "its keys share a softmax with the text's, so that no weight could stand for them"
    card = Card(
        title="Prefix tuning, P-tuning v2",
        formula="softmax(q [P_K; K]ᵀ s) [P_V; V]",
        parameters=lambda anatomy, spec: spec.numbers(anatomy),
        paper="arXiv 2101.00190",
        use="For generation on a frozen model, where a prompt is too weak.",
        limits="A prefix is never the base exactly; prefixes do not blend.",
        identity=False,
    )

    tokens: int = option(20, "how many keys and values each layer gets", minimum=1, peft="num_virtual_tokens")
    width: int | None = option(
        512, "inner width of the network that they train through; null trains them directly", minimum=1
    )
    spread: float = option(
        0.02, "standard deviation of keys and values at the start, where they train directly", minimum=0
    )

    def numbers(self, anatomy: Anatomy) -> int:
        """Trained numbers; what is stored is `tokens` times the last factor."""
        table = len(anatomy.key_blocks) * 2 * anatomy.key_heads * anatomy.head_size
        if self.width is None:
            return self.tokens * table
        first = self.tokens * anatomy.hidden + anatomy.hidden * self.width + self.width
        return first + (self.width + 1) * table

    def places(self, anatomy: Anatomy, layers: Sequence[int] | None) -> list[Place]:
        if layers is not None:
            raise LorakitError(
                f"attach: {self.name} acts in every layer, as its file format requires; leave layers out."
            )
        return attention_places(anatomy.key_blocks, self.name)

    def build(self, place: Place, anatomy: Anatomy, folded: bool = False) -> Edit:
        raise NotImplementedError("the layers of a prefix are built together")

    def build_all(self, places: Sequence[Place], anatomy: Anatomy, folded: bool = False) -> dict[Place, Edit]:
        shape = (anatomy.key_heads, self.tokens, anatomy.head_size)
        if folded or self.width is None:
            return {place: PrefixRows(self, place, shape) for place in places}
        shared = Shared(self.tokens, anatomy.hidden, self.width)
        return {place: ProjectedRows(self, place, shape, shared, place is places[0]) for place in places}


class PrefixRows(Attention):
    """K, V (key heads, tokens, head size)."""

    def __init__(self, spec: PrefixTuning, place: Place, shape: tuple[int, int, int]) -> None:
        super().__init__(spec, place)
        self.K = nn.Parameter(torch.randn(shape) * spec.spread)
        self.V = nn.Parameter(torch.randn(shape) * spec.spread)

    def keys_values(self, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return self.K, self.V


class Shared(nn.Module):
    """E (tokens, hidden) and the first half of the network, tanh(E Aᵀ + a) (tokens, width), which all layers share."""

    def __init__(self, tokens: int, hidden: int, width: int) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.randn(tokens, hidden))
        self.first = nn.Linear(hidden, width)

    def forward(self) -> Tensor:
        return torch.tanh(self.first(self.E))


class ProjectedRows(Attention):
    """One layer's part of the second half of the network."""

    def __init__(
        self, spec: PrefixTuning, place: Place, shape: tuple[int, int, int], shared: Shared, owner: bool
    ) -> None:
        super().__init__(spec, place)
        self.shape = shape
        self.second = nn.Linear(shared.first.out_features, 2 * shape[0] * shape[2])
        if owner:
            self.shared = shared
        self._shared = (shared,)  # in a tuple: the first layer's child, and not every one's

    def keys_values(self, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        heads, tokens, size = self.shape
        table = self.second(self._shared[0]()).view(tokens, 2, heads, size)
        return table[:, 0].transpose(0, 1), table[:, 1].transpose(0, 1)

    def kept(self) -> dict[str, Tensor]:
        K, V = self.keys_values(lambda hidden: (hidden, hidden))
        return {"K": K.detach(), "V": V.detach()}
