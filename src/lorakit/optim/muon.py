"""Muon for matrices and AdamW for everything else, as one optimiser.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, which has no meaning for vectors, so that it must not
have them. Both share this optimiser's groups and state, so that learning-rate schedules, checkpoints and whoever moves
state about see one optimiser. Jordan et al. 2024; the step itself is torch.optim.Muon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lorakit.errors import LorakitError


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` over 2-D parameters and `torch.optim.AdamW` over the others.

    Args:
        params: parameters or groups; a group with both kinds is split.
        lr: for groups that have none.
        options: of Muon (momentum, nesterov, ns_steps, adjust_lr_fn, ...) and, for what both have, of AdamW too. By default
            adjust_lr_fn is "match_rms_adamw", with which one learning rate fits both.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise LorakitError(f"optimizer muon: torch {torch.__version__} has none; torch 2.9 and newer do.")
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in groups:
            for chosen, two in ((matrices, True), (others, False)):
                inside = [p for p in group["params"] if (p.ndim == 2) is two]
                if inside:
                    chosen.append({"lr": lr, "weight_decay": weight_decay, **_rest(group), "params": inside})
        super().__init__([*matrices, *others], {"lr": lr, "weight_decay": weight_decay})
        options = {"adjust_lr_fn": "match_rms_adamw", **options}
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **options))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True))
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimiser's own groups and state."""
        start = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state_dict)
        self._share()


def _rest(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options; names of its parameters would be those of both halves, so they are left out."""
    return {key: value for key, value in group.items() if key not in ("params", "names")}
