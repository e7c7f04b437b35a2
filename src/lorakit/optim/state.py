"""What an optimiser remembers of a parameter, when the parameter's rank changes or its past no longer counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError


def check_movable(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Raise LorakitError unless all that the optimiser keeps of a parameter is scalars and tensors of its shape."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise LorakitError(
                f"optimizer {type(optimizer).__name__}: it keeps {key} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}, which cannot follow when ranks change. AdamW, SGD and RMSprop can."
            )


def move_ranks(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: torch.Size, left: Tensor, added: int, axis: int
) -> None:
    """Let the state follow a parameter that had `shape` and kept the indices `left` of `axis`, then grew by `added`.

    What was kept keeps its moments; what is new starts with zero.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == shape and value.ndim:
            kept = value.index_select(axis, left.to(value.device))
            new = list(kept.shape)
            new[axis] = added
            optimizer.state[parameter][key] = torch.cat([kept, kept.new_zeros(new)], dim=axis)


def forget(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Drop all that the optimiser remembers of a parameter; it starts as with a new one."""
    optimizer.state.pop(parameter, None)
