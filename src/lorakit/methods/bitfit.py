"""BitFit: only biases train.

    y = W x + b + c          c (out,), starts at zero

A bias per adapter costs nothing in a batch whose rows use different adapters, and is served as a plain bias. A 576 → 1536
layer trains 1536 numbers. Learning rates are 10 to 100 times those of full fine-tuning (about 1e-3).

The paper trains every bias of the model, those of layer norms too, which are no layers with a matrix. For exactly that:
attach(model, BitFit(), target_modules=[], bias="all"), which trains the model's own bias tensors as replacements (and
makes batches with several adapters run group by group). With target_modules given it is the biases of these layers alone.
Giving both trains the adapted layers' biases twice over. Models of the LLaMA family have no biases, so nothing can train.
Ben Zaken et al. 2021, arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import Call, Card, Delta, Form, Method, Pool, Shape
from lorakit.errors import LorakitError


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Biases of the adapted layers; it has no options."""

    name = "bitfit"
    card = Card(
        title="BitFit",
        formula="Δb = c, ΔW = 0",
        parameters=lambda shape, spec: shape.out,
        paper="arXiv 2106.10199",
        use="When the adapter must be tiny and the model has biases (BERT and similar models).",
        limits="The layer has a bias.",
    )

    def check(self, shape: Shape, path: str) -> None:
        if not shape.bias:
            raise LorakitError(
                f"attach: bitfit trains biases, and {path} has none. Name layers that have one in target_modules, leave this "
                'one out by exclude_modules, or take another method, such as ia3, which scales outputs instead; bias="all" '
                "with target_modules=[] trains whatever biases the model has, layer norms' too."
            )


class BitFitDelta(Delta, of=BitFit):
    """c of one layer."""

    def __init__(self, spec: BitFit, shape: Shape, pool: Pool) -> None:
        super().__init__(spec, shape, pool)
        self.c = nn.Parameter(torch.zeros(shape.out))

    def dense(self, W: Tensor) -> Tensor:
        return torch.zeros_like(W)

    def shift(self, b: Tensor | None, W: Callable[[], Tensor]) -> Tensor | None:
        return self.c

    def act(self, call: Call) -> Tensor:
        return torch.zeros_like(call.y)

    def form(self, W: Tensor, b: Tensor | None) -> Form:
        return Form(bias=self.c)

    def roles(self) -> dict[str, str]:
        return {"c": "bias"}
