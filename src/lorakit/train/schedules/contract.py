"""The contract of a schedule: what training does to an adapter besides optimiser steps.

A schedule knows numbers and deltas, not the Trainer, so a plain loop can drive it as well:

    schedule.begin(total)                       once
    schedule.before_forward(step, optimizer)    step counts from 1
    loss.backward(); schedule.penalise()        what a method adds to the training loss, straight into the gradients
    schedule.before_update(step, optimizer)
    optimizer.step()
    schedule.after_update(step, optimizer)
    schedule.end()                              once

All that is random is drawn from the seed and the step number, so that a resumed run draws what the whole run drew.
`state_dict` is kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lorakit.core.delta import Delta, Method

Optimizer = torch.optim.Optimizer
D = TypeVar("D", bound=Delta)
S = TypeVar("S", bound=Method)


class Schedule(Generic[S, D]):
    """One run's schedule over the deltas of one adapter; `deltas` maps their names to those that it acts on."""

    def __init__(self, spec: S, deltas: Mapping[str, D], seed: int) -> None:
        self.spec = spec
        self.deltas = dict(deltas)
        self.seed = seed
        self.total = 0

    def begin(self, total: int) -> None:
        """The run has this many optimiser steps."""
        self.total = total

    def before_forward(self, step: int, optimizer: Optimizer) -> None:
        """A step is about to compute its loss."""

    def penalise(self) -> None:
        """Add the gradient of what the method adds to the training loss; once per optimiser step."""

    def before_update(self, step: int, optimizer: Optimizer) -> None:
        """The gradients of a step are whole, the optimiser has not stepped."""

    def after_update(self, step: int, optimizer: Optimizer) -> None:
        """The optimiser has stepped."""

    def end(self) -> None:
        """The run is over."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the adapter's tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], adapter_state: Mapping[str, Tensor]) -> None:
        """Restore; `adapter_state` are the adapter's tensors, which are copied into it afterwards and must fit."""

    def generator(self, step: int) -> torch.Generator:
        """Random numbers of this step."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
