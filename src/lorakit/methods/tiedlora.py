"""Tied-LoRA: one pair of factors for all layers of a shape, and two trained vectors per layer.

    ΔW_l = s diag(v_l) B diag(u_l) A          A (rank, in) and B (out, rank) shared, u (rank) and v (out) per layer

Layers tie where their matrices have the same shape (a fused qkv ties with the other fused ones, q of 576 → 576 with o of
the same size); every other shape has a pair of its own. u and v start at one, B at zero. The gradients of A and B are sums
over the layers, so their learning rate is lower. `trained` says which of the four train: "ABuv" is the paper's TL6; "AB"
ties and nothing more; "uv" is VeRA up to the start (B is random then and v zero).
Renduchintala, Konuk, Kuchaiev 2023, arXiv 2311.09578.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import Scaled, alpha_option, dropout_option, rank_option


def _is_trained(letters: str) -> bool:
    return 0 < len(letters) == len(set(letters)) and set(letters) <= set("ABuv")


def _pooled(shapes: list[Shape], spec: Any) -> int:
    distinct = {_key(shape): shape for shape in shapes}.values()
    return sum(
        spec.rank * (shape.in_ * ("A" in spec.trained) + shape.out * ("B" in spec.trained)) for shape in distinct
    )


@dataclass(frozen=True, kw_only=True)
class TiedLoRA(Scaled):
    """The options of Tied-LoRA."""

    name = "tied-lora"
    card = Card(
        title="Tied-LoRA",
        formula="ΔW = s diag(v) B diag(u) A; A, B shared by all layers of a shape",
        parameters=lambda shape, spec: spec.rank * ("u" in spec.trained) + shape.out * ("v" in spec.trained),
        pooled=_pooled,
        paper="arXiv 2311.09578",
        use="When a deep model's adapter must be small and A and B should still learn.",
    )

    rank: int = rank_option(16, pattern=None)
    alpha: float = alpha_option(16.0, pattern=None)
    dropout: float = dropout_option()
    trained: str = option(
        "ABuv",
        "which of A, B, u and v train",
        allows=_is_trained,
        shown='one or more of the letters A, B, u, v, as in "ABuv"',
        peft="trained",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.trained) & set("Bv"):
            raise LorakitError(
                f"tied-lora: trained was given as {self.trained!r}; without B or v there is no trained tensor that could start "
                "at zero. Add one of them."
            )


def _key(shape: Shape) -> str:
    """What layers must agree on to be tied."""
    return f"{shape.out}x{shape.in_}" + (f"k{shape.taps}" if shape.taps > 1 else "") + ("e" if shape.lookup else "")


class TiedLoRADelta(LowRank, of=TiedLoRA):
    """u and v of one matrix; A and B are the pool's."""

    spec: TiedLoRA

    def __init__(self, spec: TiedLoRA, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale = spec.scale
        self.u = nn.Parameter(torch.ones(spec.rank))
        self.v = nn.Parameter(torch.ones(shape.out) if "B" in spec.trained else torch.zeros(shape.out))
        self.tied()

    def tied(self) -> tuple[Tensor, Tensor]:
        """The shared `(B, A)` of this shape: (out, rank) and (rank, in)."""
        spec, shape = self.spec, self.shape

        def random(*size: int) -> Tensor:
            tensor = torch.empty(*size)
            return tensor.normal_() if shape.lookup else nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

        # Of the two factors an embedding's one-hot input meets A, so there it is A that starts at zero, if it trains.
        zero = "" if "B" not in spec.trained else "A" if shape.lookup and "A" in spec.trained else "B"

        def entry(letter: str, *size: int) -> Tensor:
            make = torch.zeros if letter == zero else random
            name, frozen = f"tied_{letter}_{_key(shape)}", letter not in spec.trained
            return self.pool.entry(name, lambda: make(*size), frozen)

        A = entry("A", spec.rank, shape.in_)
        return entry("B", shape.out, spec.rank), A

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.tied()
        return self.v[:, None] * B.to(self.v), A.to(self.v)  # on this layer's device

    def gate(self) -> Tensor | None:
        return self.u

    def frozen(self) -> list[nn.Parameter]:
        return [vector for letter, vector in (("u", self.u), ("v", self.v)) if letter not in self.spec.trained]
