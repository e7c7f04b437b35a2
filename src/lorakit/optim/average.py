"""The weights that a run uses, where they are not those that it steps: a moving average, or a schedule-free optimiser's.

    E <- d E + (1 - d) W          after every step; d = min(decay, (1 + n) / (10 + n)) at step n, so that the start,
                                  which is far from the end, is soon forgotten

`used` puts them in place for an evaluation or a file, and gives the stepped ones back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.optim.optimisers import averages


class Average:
    """The exponential moving average (EMA) of the parameters that train, in float32."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self._values = {name: parameter.detach().clone().float() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """A step was taken."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = [parameter.to(torch.float32) for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._values.values()), now, share)

    @torch.no_grad()
    def put(self) -> None:
        """Into the parameters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average and the steps it has seen."""
        return {**self._values, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore."""
        self.steps = int(state["steps"])
        for name, value in self._values.items():
            value.copy_(state[name])


@contextmanager
def used(
    parameters: Iterable[nn.Parameter], average: Average | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[None]:
    """Within the block the parameters are those to be used; afterwards they are those that are trained, as they were."""
    switched: Any = optimizer if optimizer is not None and averages(optimizer) else None
    if average is None and switched is None:
        yield
        return
    if switched is not None:
        switched.train()
    trained = [(parameter, parameter.detach().clone()) for parameter in parameters if parameter.requires_grad]
    settle(average, switched)
    try:
        yield
    finally:
        if switched is not None:
            switched.train()
        with torch.no_grad():
            for parameter, value in trained:
                parameter.copy_(value)


def settle(average: Average | None, optimizer: torch.optim.Optimizer | None) -> None:
    """Let the parameters be those to be used, for good."""
    switched: Any = optimizer
    if switched is not None and averages(switched):
        switched.eval()
    if average is not None:
        average.put()
