"""A router whose weights the test gives, and a model with adapters of several methods under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lorakit as lk
from core.models import randomise
from lorakit.core.delta import Call, Card, Method
from lorakit.experts.context import OverAdapters, RouterContext, RouterSpec

MIXED: dict[str, Method] = {
    "lora": lk.LoRA(rank=2, alpha=3.0),
    "wide": lk.LoRA(rank=3, rslora=True),
    "dora": lk.DoRA(inner=lk.LoRA(rank=2)),
    "loha": lk.LoHa(rank=2),
}
"""Experts with factors of two ranks, and two that go by the general path."""


@dataclass(frozen=True, kw_only=True)
class Given(RouterSpec):
    """Weights as they are given."""

    name: ClassVar[str] = "given"
    card: ClassVar[Card] = Card("Given", "w", lambda shape, spec: 0, "none", "never")

    def router(self, context: RouterContext) -> GivenRouter:
        return GivenRouter(self, context)


class GivenRouter(OverAdapters):
    """`w` is (members,) or (…, members)."""

    def __init__(self, spec: Given, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.w = nn.Parameter(torch.zeros(len(self.members), dtype=torch.float64))

    def give(self, w: Any) -> None:
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float64))

    def weights(self, layer: str, site: str, call: Call, found: Tensor | None) -> Tensor:
        return self.w


def experts(model: nn.Module, methods: dict[str, Method] | None = None, **options: Any) -> list[str]:
    """Adapters of several methods on a model, with random values."""
    torch.manual_seed(1)
    chosen = MIXED if methods is None else methods
    for name, method in chosen.items():
        randomise(lk.attach(model, method, name=name, **options))
    model.double()
    return list(chosen)


def given(model: nn.Module, members: Sequence[str], w: Any = None) -> GivenRouter:
    """The probe on a model."""
    router = lk.route(model, Given(), members).router
    assert isinstance(router, GivenRouter)
    if w is not None:
        router.give(w)
    return router
