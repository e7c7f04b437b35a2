"""The RMSNorms, gated activations and rotary positions of a model: found, tried out, and computed otherwise for a while.

Training and serving replace the same parts, each by functions of its own over `elementwise.py`. A part is replaced only where
the plain formula gives what the module itself gives on a small input; the rest stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.native.elementwise import GATES, norm_rows, rotate

Forward = Callable[[Tensor], Tensor]
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], "tuple[Tensor, Tensor] | None"]
"""q and k [1, heads, tokens, d] turned by cos and sin [tokens, d]; None where the original shall do it."""

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the last axis; `shift` is added to its weight."""

    module: nn.Module
    eps: float
    shift: float

    def formula(self, x: Tensor) -> Tensor:
        """What it computes, in plain PyTorch."""
        weight: Any = self.module.weight
        return norm_rows(x.reshape(-1, x.shape[-1]), weight, eps=self.eps, shift=self.shift)[0].view(x.shape)


@dataclass(frozen=True)
class Gated:
    """A feed-forward part `down_proj(act(gate_proj(x)) * up_proj(x))`, whose activation is one of `GATES`."""

    module: Any
    kind: str

    def formula(self, x: Tensor) -> Tensor:
        """What it computes, in plain PyTorch."""
        gated = GATES[self.kind][0](self.module.gate_proj(x), self.module.up_proj(x))
        return self.module.down_proj(gated)  # type: ignore[no-any-return]


class Rotary:
    """Stands for the `apply_rotary_pos_emb` of a modelling file, which all models of one kind share: whoever has replaced it is
    asked in turn, and the original last."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.turns: list[Turn] = []

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and q.dim() == 4 and q.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3]):
            for turn in self.turns:
                if (turned := turn(q, k, cos[0], sin[0])) is not None:
                    return turned
        return self.original(q, k, cos, sin, *args, **kwargs)


@dataclass
class Replaced:
    """What was replaced in a model, until `restore`."""

    norms: int = 0
    gates: int = 0
    rotaries: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)

    def restore(self) -> None:
        """Put everything back."""
        while self.undo:
            self.undo.pop()()


def replace(
    model: nn.Module, norm: Callable[[Norm], Forward | None], gate: Callable[[Gated], Forward | None], turn: Turn
) -> Replaced:
    """Give every norm and gated part the forward that `norm` and `gate` make for it (None leaves it), and let `turn` compute
    rotary positions."""
    done = Replaced()
    modelling: set[str] = set()
    for module in model.modules():
        if "forward" in vars(module):
            continue
        forward: Forward | None = None
        if (found := find_norm(module)) is not None:
            forward = norm(found)
            done.norms += forward is not None
        elif (gated := find_gated(module)) is not None:
            forward = gate(gated)
            done.gates += forward is not None
        if forward is not None:
            module.forward = forward
            done.undo.append(lambda module=module: module.__dict__.pop("forward", None))  # type: ignore[misc]
        if (name := type(module).__module__).startswith("transformers."):
            modelling.add(name)
    done.rotaries = sum(_replace_rotary(sys.modules[name], turn, done.undo) for name in sorted(modelling))
    return done


def find_norm(module: nn.Module) -> Norm | None:
    """The norm that a module is, with its weight as it is or shifted by one."""
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    if eps is None or len(list(module.parameters())) != 1:
        return None
    tried = (Norm(module, float(eps), shift) for shift in (0.0, 1.0))
    return next((one for one in tried if _agrees(module, one.formula, (3, weight.shape[0]), weight)), None)


def find_gated(module: nn.Module) -> Gated | None:
    """The gated part that a module is."""
    parts = [getattr(module, name, None) for name in GATED]
    if not all(callable(part) for part in parts) or {name for name, _ in module.named_children()} - set(GATED):
        return None
    first = next(iter(module.parameters()), None)
    if first is None and isinstance(dtype := getattr(parts[0], "dtype", None), torch.dtype):  # all of it is quantised
        first = nn.Parameter(next(module.buffers()).new_empty(0, dtype=dtype), requires_grad=False)
    width = getattr(parts[0], "in_features", None) or getattr(getattr(parts[0], "base", None), "in_features", None)
    width = getattr(module, "hidden_size", None) if width is None else width
    if first is None or not isinstance(width, int):
        return None
    act: Any = parts[3]
    x = torch.linspace(-4, 4, 33, device=first.device)
    one = torch.ones_like(x)
    try:
        with torch.no_grad():
            found = (kind for kind, (formula, _) in GATES.items() if torch.allclose(act(x), formula(x, one), atol=1e-6))
            kind = next(found, "")
    except Exception:  # an activation may ask for anything: then it is none of these
        return None
    if not kind or not _agrees(module, Gated(module, kind).formula, (1, 3, width), first):
        return None
    return Gated(module, kind)


def _agrees(module: nn.Module, formula: Forward, shape: tuple[int, ...], like: Tensor) -> bool:
    """Does a formula give what the module gives, to a few roundings of its dtype?"""
    dtype = next((p.dtype for p in module.parameters() if p.dtype != torch.float32), like.dtype)
    x = torch.linspace(-2, 2, torch.Size(shape).numel(), device=like.device).view(shape).sin().to(dtype)
    training = module.training
    try:
        module.eval()  # an adapter's dropout would tell the two apart
        with torch.no_grad():
            expected, found = module(x).double(), formula(x).double()
            gap, largest = (expected - found).abs().max(), expected.abs().max().clamp_min(1e-30)
    except Exception:  # whatever a module wants otherwise, or returns: it is not this one
        return False
    finally:
        module.train(training)
    bound = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
    return bool(gap <= bound * largest)


def _replace_rotary(modelling: Any, turn: Turn, undo: list[Callable[[], None]]) -> bool:
    """Let `turn` do what the rotary function of a modelling file does, if that is the usual one."""
    rotary = getattr(modelling, "apply_rotary_pos_emb", None)
    if rotary is None:
        return False
    if not isinstance(rotary, Rotary):
        q, k = (
            torch.linspace(-1, 1, 3 * 5 * 8).sin().view(1, 3, 5, 8),
            torch.linspace(-2, 1, 5 * 8).cos().view(1, 1, 5, 8),
        )
        angles = torch.linspace(0, 3, 5 * 8).view(5, 8)
        cos, sin = angles.cos(), angles.sin()
        try:
            pairs = zip((q, k), rotary(q, k, cos[None], sin[None]), strict=True)
            turned = [(rotate(x[0].transpose(0, 1), cos, sin).transpose(0, 1)[None], expected) for x, expected in pairs]
            if not all(torch.allclose(found, expected, atol=1e-5) for found, expected in turned):
                return False
        except Exception:  # a rotary function of another form may fail in any way
            return False
        rotary = modelling.apply_rotary_pos_emb = Rotary(rotary)
    rotary.turns.append(turn)

    def restore() -> None:
        rotary.turns.remove(turn)
        if not rotary.turns and modelling.apply_rotary_pos_emb is rotary:
            modelling.apply_rotary_pos_emb = rotary.original

    undo.append(restore)
    return True
