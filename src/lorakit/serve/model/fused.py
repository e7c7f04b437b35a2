"""Elementwise operations of the serving model (RMSNorm, rotary positions, gated activations) in C++, or on a GPU in Triton.

A step of a small model spends as much time between its matmuls as in them: RMSNorm alone is seven passes of PyTorch over
the tokens. `native/replacement.py` finds the parts and tries them; outside of a step every one computes as it did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.core.storage.contract import FLOATS
from lorakit.native import elementwise, replacement
from lorakit.native.choice import CPU
from lorakit.serve.model.attention import ForwardContext

THREAD = threading.local()
"""`serving` is true in the thread that runs a step just now: a rotary function is shared with models that do not serve."""


@dataclass
class Norm:
    """The forward of an RMSNorm; `shift` is added to its weight."""

    original: Callable[[Tensor], Tensor]
    context: ForwardContext
    weight: Tensor
    eps: float
    shift: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.context.batch is None or x.dtype != self.weight.dtype or not x.is_contiguous():
            return self.original(x)
        return elementwise.norm(x, self.weight, self.eps, self.shift)


@dataclass
class Gate:
    """The forward of a feed-forward part that is `down(act(gate(x)) * up(x))`; `kind` names the activation."""

    original: Callable[[Tensor], Tensor]
    context: ForwardContext
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    kind: str

    def __call__(self, x: Tensor) -> Tensor:
        if self.context.batch is None:
            return self.original(x)
        return self.down(elementwise.gate(self.kind, self.gate(x), self.up(x)))  # type: ignore[no-any-return]


def fuse(model: nn.Module, context: ForwardContext) -> Callable[[], None]:
    """Put these operations into a model; returns what takes them out again."""

    def norm(found: replacement.Norm) -> Norm | None:
        module, weight = found.module, found.module.weight
        assert isinstance(weight, Tensor)
        there = elementwise.available(weight.device, weight.dtype)
        return Norm(module.forward, context, weight, found.eps, found.shift) if there else None

    def gate(found: replacement.Gated) -> Gate | None:
        part = found.module
        layer = part.gate_proj
        own = layer.weight if isinstance(layer, nn.Linear) else layer  # BlockLinear has a dtype, on processors alone
        dtype, device = getattr(own, "dtype", None), getattr(own, "device", CPU)
        if dtype not in FLOATS or not elementwise.available(device, dtype):
            return None
        return Gate(part.forward, context, part.gate_proj, part.up_proj, part.down_proj, found.kind)

    return replacement.replace(model, norm, gate, _turn).restore


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    plain = (
        getattr(THREAD, "serving", False)
        and k.dim() == 4
        and k.shape[0] == 1
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.stride(3) == k.stride(3) == 1
        and elementwise.available(q.device, q.dtype)
    )
    if not plain:
        return None
    cos, sin = cos.contiguous(), sin.contiguous()
    return elementwise.turn(q, cos, sin), elementwise.turn(k, cos, sin)
