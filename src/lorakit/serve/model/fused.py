"""RMSNorm, rotary positions and gated activations of a served model, through compiled loops where these agree with the model.

A step of a small model spends as much time between its matmuls as in them: RMSNorm alone is seven passes of PyTorch over
the tokens. Each module is replaced only if on trial the loop gives what the module gives; the rest stays as it is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.serve.model import native
from lorakit.serve.model.attention import Present

THREAD = threading.local()
"""`serving` is true in the thread that runs a step just now: a rotary function is shared with models that are not served."""


def fuse(model: nn.Module, present: Present) -> Callable[[], None]:
    """Put the compiled loops into a model; returns what takes them out again."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if "forward" in vars(module):
            continue
        forward = _norm(module, present) or _gate(module, present)
        if forward is not None:
            module.forward = forward
            undo.append(lambda module=module: module.__dict__.pop("forward", None))  # type: ignore[misc]
    for name in {type(module).__module__ for module in model.modules()}:
        if name.startswith("transformers."):
            _rotary(sys.modules[name], undo)

    def restore() -> None:
        for step in undo:
            step()

    return restore


def _agree(found: Tensor, expected: Tensor) -> bool:
    """To a few roundings of the dtype."""
    allowed = 8 * torch.finfo(expected.dtype).eps
    return found.shape == expected.shape and bool(
        ((found - expected).abs().float() <= allowed * (expected.abs().float() + 1)).all()
    )


@dataclass
class Norm:
    """The forward of an RMSNorm; `shift` is added to its weight."""

    original: Callable[[Tensor], Tensor]
    present: Present
    weight: Tensor
    eps: float
    shift: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.present.batch is None or x.dtype != self.weight.dtype or not x.is_contiguous():
            return self.original(x)
        return native.norm(x, self.weight, self.eps, self.shift)


@dataclass
class Gate:
    """The forward of a feed-forward part that is `down(silu(gate(x)) * up(x))`."""

    original: Callable[[Tensor], Tensor]
    present: Present
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        if self.present.batch is None:
            return self.original(x)
        return self.down(native.gate(self.gate(x), self.up(x)))  # type: ignore[no-any-return]


def _norm(module: nn.Module, present: Present) -> Norm | None:
    """A forward for a module that is an RMSNorm, with its weight as it is or shifted by one."""
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    if eps is None or len(list(module.parameters())) != 1 or native.find("norm", weight.dtype) is None:
        return None
    x = torch.linspace(-2, 2, 3 * weight.shape[0]).sin().view(3, -1).to(weight.dtype)
    for shift in (0.0, 1.0):
        if not _agree(native.norm(x, weight, float(eps), shift), module(x)):
            continue

        return Norm(module.forward, present, weight, float(eps), shift)
    return None


def _gate(module: nn.Module, present: Present) -> Gate | None:
    """A forward for a module that is `down(silu(gate(x)) * up(x))`."""
    names = {name for name, _ in module.named_children()}
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if names - {"gate_proj", "up_proj", "down_proj", "act_fn"} or None in parts:
        return None
    gate, up, down, act = parts
    if not isinstance(gate, nn.Linear) or native.find("gate", gate.weight.dtype) is None:
        return None
    probe = torch.linspace(-4, 4, 33)
    if not torch.allclose(act(probe), nn.functional.silu(probe), atol=1e-6):
        return None
    x = torch.linspace(-2, 2, 3 * gate.in_features).sin().view(1, 3, -1).to(gate.weight.dtype)
    if not torch.allclose(down(native.gate(gate(x), up(x))).float(), module(x).float(), rtol=0.02, atol=1e-2):
        return None
    return Gate(module.forward, present, gate, up, down)


def _rotary(modelling: Any, undo: list[Callable[[], None]]) -> None:
    """Turn a modelling file's rotary function over to the loop, for served calls."""
    original = getattr(modelling, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "_lorakit"):
        if original is not None:  # a second engine over the same kind of model
            original._lorakit += 1
            undo.append(lambda: _put_back(modelling, original))
        return
    q, k = torch.linspace(-1, 1, 2 * 5 * 8).sin().view(1, 2, 5, 8), torch.linspace(-2, 1, 5 * 8).cos().view(1, 1, 5, 8)
    angles = torch.linspace(0, 3, 5 * 8).view(1, 5, 8)
    try:
        expected = original(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, ValueError):
        return
    found = [native.turn(x, angles.cos()[0], angles.sin()[0]) for x in (q, k)]
    if not (isinstance(expected, tuple) and all(_agree(a, b) for a, b in zip(found, expected, strict=True))):
        return

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = (
            getattr(THREAD, "serving", False)
            and not args
            and not kwargs
            and q.dim() == k.dim() == 4
            and q.shape[0] == k.shape[0] == 1
            and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.stride(3) == k.stride(3) == 1
            and native.find("turn", q.dtype) is not None
        )
        if not plain:
            return original(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
        return native.turn(q, cos, sin), native.turn(k, cos, sin)

    rotary._lorakit = 1  # type: ignore[attr-defined]
    rotary._original = original  # type: ignore[attr-defined]
    modelling.apply_rotary_pos_emb = rotary
    undo.append(lambda: _put_back(modelling, rotary))


def _put_back(modelling: Any, rotary: Any) -> None:
    rotary._lorakit -= 1
    if not rotary._lorakit:
        modelling.apply_rotary_pos_emb = rotary._original
