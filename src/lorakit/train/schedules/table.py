"""The schedules by name, DyLoRA's draw, ReLoRA's restarts, and the wire to the Trainer.

A method names its schedule (`Method.schedule`), the Trainer asks `schedule_for` once and tells it what happens; there is
no call for the user to remember. `contract.py` says what a schedule is, `ranking.py` has those of AdaLoRA and ElaLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from lorakit.core.combinator import Combinator
from lorakit.core.delta import Delta
from lorakit.methods.adalora import Triplets
from lorakit.methods.dylora import DyLoRA, DyLoRADelta
from lorakit.methods.lora import start_factors
from lorakit.methods.options import share_of
from lorakit.methods.relora import ReLoRA, ReLoRADelta
from lorakit.optim.state import forget
from lorakit.train.schedules.contract import Optimizer, Schedule
from lorakit.train.schedules.ranking import Budget, Exchange

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter

# -- DyLoRA ----------------------------------------------------------------------------------------------------------------


class Draw(Schedule[DyLoRA, DyLoRADelta]):
    """DyLoRA: one rank per step for the whole model; components that the step does not train stay where they are."""

    def drawn(self, step: int) -> int:
        """The rank of a step, uniform from `smallest` to `rank`."""
        largest = max(len(delta.A) for delta in self.deltas.values())
        return int(torch.randint(self.spec.smallest, largest + 1, (), generator=self.generator(step)))

    def before_forward(self, step: int, optimizer: Optimizer) -> None:
        b = self.drawn(step)
        for delta in self.deltas.values():
            delta.drawn = b

    def before_update(self, step: int, optimizer: Optimizer) -> None:
        """Remember the components that are not trained: their gradient is zero, yet momentum and decay would move them."""
        self._still: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []
        for delta in self.deltas.values():
            trained = delta.trained()
            still = torch.ones(len(delta.A), dtype=torch.bool, device=delta.A.device)
            still[trained] = False
            for parameter, mask in ((delta.A, still[:, None]), (delta.B, still[None])):
                if parameter.grad is None or not mask.any():
                    continue
                held = {key: value.clone() for key, value in _state_of(parameter, optimizer).items()}
                self._still.append((parameter, mask, parameter.detach().clone(), held))

    @torch.no_grad()
    def after_update(self, step: int, optimizer: Optimizer) -> None:
        for parameter, mask, value, held in self._still:
            parameter.copy_(torch.where(mask, value, parameter))
            for key, now in _state_of(parameter, optimizer).items():
                before = held.get(key)
                now.copy_(torch.where(mask, torch.zeros_like(now) if before is None else before, now))
        self._still = []

    def end(self) -> None:
        for delta in self.deltas.values():
            delta.drawn = None


def _state_of(parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps for each number of a parameter."""
    state = optimizer.state.get(parameter, {}).items()
    return {key: value for key, value in state if isinstance(value, Tensor) and value.shape == parameter.shape}


# -- ReLoRA ----------------------------------------------------------------------------------------------------------------


class Restart(Schedule[ReLoRA, ReLoRADelta]):
    """ReLoRA: put the product aside every so often, start anew, let the learning rate rise again."""

    def begin(self, total: int) -> None:
        super().begin(total)
        self.every = max(1, share_of(self.spec.every, total))

    def since(self, step: int) -> int | None:
        """Steps since the last restart, this one counted; None before the first."""
        return None if step <= self.every else (step - 1) % self.every + 1

    def factor(self, step: int) -> float:
        """What the learning rate of a step is multiplied by."""
        since = self.since(step)
        return 1.0 if since is None or not self.spec.rewarm else min(1.0, since / self.spec.rewarm)

    def due(self, step: int) -> bool:
        """Whether to restart after a step: not at the very end, nor where the rate would have no time to rise."""
        return step % self.every == 0 and self.total - step > min(self.spec.rewarm, self.every - 1)

    def before_update(self, step: int, optimizer: Optimizer) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor(step)

    @torch.no_grad()
    def after_update(self, step: int, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        if not self.due(step):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.generator(step).initial_seed())
            for delta in self.deltas.values():
                B, A = start_factors(delta.shape, len(delta.A))
                delta.restart(B.to(delta.B), A.to(delta.A))
                for parameter in (delta.A, delta.B):
                    forget(optimizer, parameter)

    def load_state_dict(self, state: Mapping[str, Tensor], adapter_state: Mapping[str, Tensor]) -> None:
        for name, delta in self.deltas.items():
            delta.hold(len(adapter_state[f"{name}.A_kept"]))


# -- chosen by the method --------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, tuple[type[Schedule[Any, Any]], type[Delta]]] = {
    "budget": (Budget, Triplets),
    "exchange": (Exchange, Triplets),
    "draw": (Draw, DyLoRADelta),
    "restart": (Restart, ReLoRADelta),
}
"""`Method.schedule` -> the schedule and the deltas that it acts on."""


def schedule_for(adapter: Adapter, seed: int = 0) -> Schedule[Any, Any] | None:
    """The schedule that an adapter's method asks for, over all its deltas of that kind; None where it asks for none."""
    spec: Any = adapter.method
    while isinstance(spec, Combinator) and spec.schedule is None:
        spec = spec.inner
    if spec.schedule is None:
        return None
    kind, wanted = SCHEDULES[str(spec.schedule)]
    deltas = {
        f"{prefix}.{name}" if name else prefix: module
        for prefix, held in adapter.modules()
        for name, module in held.named_modules()
        if isinstance(module, wanted)
    }
    return kind(spec, deltas, seed)


class ScheduleCallback(TrainerCallback):
    """Tells a schedule what a Trainer does. It stands after the health watch, which may take the gradients away."""

    def __init__(self, schedule: Schedule[Any, Any]) -> None:
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.schedule.begin(state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.schedule.before_forward(state.global_step + 1, given["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.schedule.before_update(state.global_step + 1, given["optimizer"])

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.schedule.after_update(state.global_step + 1, given["optimizer"])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.schedule.end()
