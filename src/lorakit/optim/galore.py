"""GaLore: full weights trained with optimiser state of low rank.

    R = G Pᵀ  or  Pᵀ G          G (out, in) the gradient, P an orthonormal basis of `rank` on the smaller side
    W <- W - lr · scale · (back from R-space: the inner optimiser's step for R)

Every `interval` steps the basis is taken anew from the singular vectors of the present gradient. Moments have the size of
R: 2 · rank · max(out, in) numbers and the basis rank · min(out, in), instead of 2 · out · in. All weights train and
nothing has to be merged, so this is for full fine-tuning (`methods/full.py`); parameters that are no matrix, or no larger
than the rank, are optimised as they are. Zhao et al. 2024, arXiv 2403.03507.

What is lost by simplicity: moments are not rotated when the basis changes, as in the paper's code. New singular vectors
are given the signs that agree best with the old ones, so that a mere change of sign does not turn momentum around. Every
gradient is there at once; updating each as soon as it is known would need a hook per parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError

Side = Literal["std", "reverse", "left", "right"]
SIDES: tuple[Side, ...] = ("std", "reverse", "left", "right")


def side_of(shape: torch.Size, side: Side) -> Literal["left", "right"]:
    """Where the basis of a matrix of this shape stands: "std" is the smaller side, "reverse" the larger."""
    if side in ("left", "right"):
        return side
    tall = shape[0] >= shape[1]
    return "right" if tall == (side == "std") else "left"


def basis(G: Tensor, rank: int, side: Literal["left", "right"], before: Tensor | None = None) -> Tensor:
    """The leading singular vectors of `G` (out, in): (out, rank) on the left, (rank, in) on the right.

    With `before`, each has the sign that agrees with the old one.
    """
    precise = G.to(torch.promote_types(G.dtype, torch.float32))
    U, _, Vh = torch.linalg.svd(precise, full_matrices=False)
    P: Tensor = (U[:, :rank] if side == "left" else Vh[:rank]).to(G.dtype)
    if before is None:
        return P.clone(memory_format=torch.contiguous_format)  # a view would keep all singular vectors alive
    axis = 0 if side == "left" else 1
    agreement = (P * before).sum(axis, keepdim=True)
    return torch.where(agreement < 0, -P, P)


def project(G: Tensor, P: Tensor, side: Literal["left", "right"]) -> Tensor:
    """R: (rank, in) for a basis on the left, (out, rank) for one on the right."""
    return P.T @ G if side == "left" else G @ P.T


def back(R: Tensor, P: Tensor, side: Literal["left", "right"]) -> Tensor:
    """The matrix (out, in) that `R` stands for."""
    return P @ R if side == "left" else R @ P


class GaLore(torch.optim.Optimizer):
    """Any elementwise optimiser, its state in a projected space for matrices.

    Args:
        params: parameters or groups; a group may have its own rank, interval, scale and side.
        lr: for groups that have none.
        rank: of the basis; 2-D parameters whose smaller side is above it are projected.
        interval: steps between two bases.
        scale: multiplies the step of projected parameters.
        side: "std" (the smaller side), "reverse", "left" or "right".
        weight_decay: decoupled.
        inner: the optimiser's class; bitsandbytes' AdamW8bit for 8-bit moments.
        options: of the inner optimiser.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        interval: int = 200,
        scale: float = 0.25,
        side: Side = "std",
        weight_decay: float = 0.0,
        inner: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **options: Any,
    ) -> None:
        if not isinstance(rank, int) or rank < 1 or not isinstance(interval, int) or interval < 1:
            raise LorakitError(f"galore: rank is {rank!r} and interval {interval!r}; both are integers of at least 1.")
        if side not in SIDES:
            raise LorakitError(f"galore: side was given as {side!r}; it is one of {', '.join(SIDES)}.")
        own = {"rank": rank, "interval": interval, "scale": scale, "side": side}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own})
        self._proxies: dict[nn.Parameter, nn.Parameter] = {}
        inside = []
        for group, parameters, projected in self._halves():
            # The inner optimiser decays what it steps itself; projected weights are decayed here.
            chosen = [self._stand_in(p) for p in parameters] if projected else parameters
            decay = 0.0 if projected else group["weight_decay"]
            inside.append({"params": chosen, "lr": group["lr"], "weight_decay": decay})
        self._inner = inner(inside, lr=lr, **options)

    def _halves(self) -> list[tuple[dict[str, Any], list[nn.Parameter], bool]]:
        """Every group's projected parameters and its others, without empty halves: one inner group each."""
        halves = []
        for group in self.param_groups:
            for projected in (True, False):
                chosen = [p for p in group["params"] if _projects(p, group["rank"]) is projected]
                if chosen:
                    halves.append((group, chosen, projected))
        return halves

    def _stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """A parameter in the projected space, which holds numbers only during a step."""
        self._proxies[parameter] = nn.Parameter(parameter.new_empty(0))
        return self._proxies[parameter]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for (source, _, _), group in zip(self._halves(), self._inner.param_groups, strict=True):
            group["lr"] = source["lr"]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._proxies and parameter.grad is not None:
                    self._lower(parameter, group)
        self._inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                proxy = self._proxies.get(parameter)
                if proxy is not None and proxy.grad is not None:
                    self._raise(parameter, proxy, group)
        return loss

    def _lower(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """The gradient into the projected space, with a new basis where one is due."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        side = side_of(parameter.shape, group["side"])
        steps = state.get("steps", 0)
        if steps % group["interval"] == 0:
            state["P"] = basis(gradient, group["rank"], side, state.get("P"))
        state["steps"] = steps + 1
        proxy = self._proxies[parameter]
        proxy.grad = None
        R = project(gradient, state["P"], side).contiguous()
        proxy.data = torch.zeros_like(R)
        proxy.grad = R

    def _raise(self, parameter: nn.Parameter, proxy: nn.Parameter, group: dict[str, Any]) -> None:
        """The inner optimiser's step for R, as a step of the weight."""
        step = back(proxy.data, self.state[parameter]["P"], side_of(parameter.shape, group["side"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=group["scale"])
        proxy.grad = None
        proxy.data = parameter.new_empty(0)

    def state_dict(self) -> dict[str, Any]:
        """Bases and steps, and the inner optimiser's state."""
        return {**super().state_dict(), "inner": self._inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        own = dict(state_dict)
        self._inner.load_state_dict(own.pop("inner"))
        super().load_state_dict(own)


def _projects(parameter: Tensor, rank: int) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) > rank
