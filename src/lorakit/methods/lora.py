"""LoRA: a frozen weight, and beside it a trained product of two thin matrices.

    y = W x + b + s B A drop(x)          A (rank, in), B (out, rank), s = alpha / rank, or alpha / √rank (rsLoRA)

B starts at zero, so training starts from the base model. For an embedding the factor that meets the one-hot input is
the zero one. One running example: a 576 → 1536 layer at rank 16 trains 16 · (576 + 1536) = 33,792 numbers instead of
884,736. Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lorakit.core.delta import Card, LowRank, Pool, Shape
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.methods.options import Scaled, alpha_option, check_rank_fits, dropout_option, rank_option

_REFUSED = {
    "lora_bias": "a bias on B is not part of ΔW",
    "layer_replication": "it repeats layers of the base, which changes the model itself",
    "target_parameters": "it adapts bare parameters",
    "trainable_token_indices": "it replaces rows of an embedding",
    "alora_invocation_tokens": "the adapter acts from certain tokens on only",
    "use_qalora": "its A reads pooled inputs",
    "use_bdlora": "its factors are block-diagonal and stored compactly",
    "arrow_config": "it is a router over other adapters",
    "kasa_config": "its base is truncated",
    "velora_config": "VeLoRA is another method",
    "monteclora_config": "MonteCLoRA is another method",
    "megatron_config": "it adapts Megatron's parallel layers",
}
_SHIFTING = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(Scaled):
    """The options that LoRA and its nearest kin share."""

    peft_type: ClassVar[str | None] = "LORA"
    peft_ignored: ClassVar[frozenset[str]] = frozenset(
        {"init_lora_weights", "fan_in_fan_out", "ensure_weight_tying", "eva_config", "corda_config", "lora_ga_config",
         "loftq_config", "megatron_core", "qalora_group_size", "runtime_config"}
    )  # fmt: skip
    rank: int = rank_option(16, peft_default=8)
    alpha: float = alpha_option(
        16.0, "numerator of the scale, alpha / rank; keep it when you change the rank", peft_default=8
    )
    dropout: float = dropout_option()
    rslora: bool = option(False, "scale by alpha / √rank, which stays stable at large ranks", peft="use_rslora")

    def divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rslora else rank

    def check(self, shape: Shape, path: str) -> None:
        check_rank_fits(self.rank, shape, path)

    def peft_config(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": False,
            "lora_bias": False,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self:
        for entry, why in _REFUSED.items():
            if config.get(entry):
                raise LorakitError(f"load: the configuration sets {entry}={config[entry]!r}: {why}.")
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start.partition("_niter")[0] in _SHIFTING:
            raise LorakitError(
                f"load: the configuration says init_lora_weights={start!r}, so the tensors belong to a base whose weights "
                "that start has changed, not to the original. In PEFT, save it with path_initial_model_for_weight_conversion "
                "to get a plain LoRA for the original base."
            )
        return cls(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            rslora=bool(config.get("use_rslora", False)),
        )


@dataclass(frozen=True, kw_only=True)
class LoRA(LoRAOptions):
    """Low-rank adaptation, Hu et al. 2021."""

    name: ClassVar[str] = "lora"
    card: ClassVar[Card] = Card(
        title="LoRA",
        formula="ΔW = s B A, s = alpha / rank (rsLoRA: alpha / √rank)",
        parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_),
        paper="arXiv 2106.09685; rsLoRA arXiv 2312.03732",
        use="The default: cheap, merges exactly, every server reads it.",
    )

    def build(self, shape: Shape, pool: Pool) -> LoRADelta:
        return LoRADelta(self, shape, pool)

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and not config.get("use_dora")


class TwoFactors(LowRank):
    """The family that trains A (rank, in) and B (out, rank) of one matrix; a member says in `factors` how they act."""

    def __init__(self, spec: LoRAOptions, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        B, A = start_factors(shape, spec.rank)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def roles(self) -> dict[str, str]:
        # the factor that starts at zero is B, for an embedding A
        return {"A": "B", "B": "A"} if self.shape.lookup else {}

    def set_factors(self, B: Tensor, A: Tensor) -> None:
        with torch.no_grad():
            self.B.copy_(B)
            self.A.copy_(A)

    def peft_keys(self, kind: str) -> dict[str, tuple[str, str]]:
        if kind == "embedding":
            return {"A": ("lora_embedding_A", "in"), "B": ("lora_embedding_B", "out")}
        return {"A": ("lora_A.weight", "in"), "B": ("lora_B.weight", "out")}


class LoRADelta(TwoFactors):
    """A and B of one matrix."""

    def __init__(self, spec: LoRAOptions, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.scale, self.dropout = spec.scale, spec.dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A


def start_factors(shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    """`(B, A)` as LoRA starts: A uniform within 1/√in and B zero; for an embedding A zero and B normal."""
    if shape.lookup:
        return torch.empty(shape.out, rank).normal_(), torch.zeros(rank, shape.in_)
    bound = 1 / math.sqrt(shape.in_)
    return torch.zeros(shape.out, rank), torch.empty(rank, shape.in_).uniform_(-bound, bound)
