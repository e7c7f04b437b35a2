"""Learning rates over a run: transformers' schedules by name, with defaults for what they leave open, and REX.

REX (Chen et al. 2021, arXiv 2107.04197) falls slowly at first and fast at the end: (1 - t) / (1 - t / 2) of the rate, for
the share t of the run that is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lorakit.errors import LorakitError

FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules that change the rate by what an evaluation found."""


def build_scheduler(
    name: str, optimizer: torch.optim.Optimizer, warmup: int, total: int, options: Mapping[str, Any]
) -> Any:
    """A schedule over an optimiser's groups, whose rates it multiplies.

    Args:
        name: transformers' name of a schedule, or rex.
        optimizer: whose rates it sets.
        warmup: steps in which the rate rises; for most schedules.
        total: steps of the run.
        options: further arguments: {num_cycles: 3}, {min_lr_rate: 0.1}.

    Raises:
        LorakitError: it refuses the options.
    """
    defaults: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": 3},
        "cosine_with_min_lr": {} if "min_lr" in options else {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {} if "min_lr" in options else {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": math.ceil(0.1 * total)},
    }
    given = {**defaults.get(name, {}), **options}
    if name == "rex" or (name in ("constant", "constant_with_warmup") and given):
        if given:
            raise LorakitError(f"scheduler {name}: it has no options; found {given}.")
        return LambdaLR(optimizer, lambda step: _rex(step, warmup, total))
    from transformers import get_scheduler  # here: it imports PEFT, and a script may first say which module that is

    try:
        return get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as problem:
        raise LorakitError(f"scheduler {name}: it refuses its options {given or ''}: {problem}") from None


def _rex(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return (1 - done) / (1 - done / 2)
