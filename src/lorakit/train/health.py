"""A health watch over a run: it says in words what it sees, and what was done about it.

A run that goes wrong usually shows it in numbers nobody reads: a loss that is not a number, a jump, a training loss that
sinks while the evaluation loss climbs, a layer whose adapter never got a gradient. `HealthWatch` judges those numbers. It
knows neither torch nor the Trainer, so a test can feed it by hand; `HealthCallback` connects it to a running Trainer.

A step whose loss or gradient is not finite is skipped whole (the parameters and the optimiser's moments keep their values),
and after a few of those in a row the run is stopped, because the same data and the same weights would fail the same way
again. Everything else is reported, not acted upon.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from lorakit.errors import plural

log = logging.getLogger("lorakit.train")

Kind = Literal["not_finite", "spike", "low_loss", "gap", "no_gradient"]
Action = Literal["told", "skipped", "stopped"]


@dataclass(frozen=True)
class Finding:
    """One thing the watch saw: at which optimiser step, what kind, what was done, and the sentence for a person."""

    step: int
    kind: Kind
    action: Action
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"


@dataclass(frozen=True)
class HealthLimits:
    """When the watch speaks up.

    `stop_after`: how many steps in a row may be skipped before the run is stopped.
    `window`: how many recent losses the running median is taken over; nothing is judged before half of them are in.
    `spike`: a loss this many times the running median (and far outside its usual scatter) is a spike.
    `low_loss`: a running median below this asks whether the rows are being memorised.
    `gap`: the evaluation loss must be this share above its best before a widening gap is reported.
    `gradient_steps`: after how many steps every tensor of the adapter must have had a gradient once. Not one: half of a
    low-rank pair starts at zero, so the other half has no gradient at the first step, nor during a warm-up that begins at a
    learning rate of zero.
    """

    stop_after: int = 5
    window: int = 40
    spike: float = 2.0
    low_loss: float = 0.2
    gap: float = 0.05
    gradient_steps: int = 10


class HealthWatch:
    """Judges the numbers of a run. Feed it once per optimiser step; every method returns what is new to say."""

    def __init__(self, limits: HealthLimits | None = None) -> None:
        self.limits = limits or HealthLimits()
        self.findings: list[Finding] = []
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=self.limits.window)
        self._evaluations: list[tuple[float, float]] = []
        self._present: set[Kind] = set()  # what is the case now, and was told when it began
        self._pending: set[str] | None = None
        self._gradients_told = False

    def step(self, step: int, loss: float, gradient_norm: float) -> list[Finding]:
        """Judge one optimiser step before it is taken.

        `loss` is the mean training loss of the step, `gradient_norm` the norm of the adapter's whole gradient. The caller
        must not take the step when a finding's action is "skipped" or "stopped".
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return [self._not_finite(step, loss, gradient_norm)]
        self.skipped_in_a_row = 0
        new = self._spike(step, loss)
        self._losses.append(loss)
        return [*new, *self._low_loss(step)]

    def evaluation(self, step: int, loss: float) -> list[Finding]:
        """Judge an evaluation loss against the training loss of the same stretch of the run."""
        if not math.isfinite(loss):
            text = f"the evaluation loss is {_number(loss)}: on some held-out row the model gives no probabilities"
            return [self._found(step, "not_finite", text)]
        if not self._losses:
            return []
        # The window is long for spikes; for the gap only what was trained since the last evaluations counts.
        training = median(list(self._losses)[-max(5, self.limits.window // 4) :])
        self._evaluations.append((training, loss))
        gaps = [evaluated - trained for trained, evaluated in self._evaluations[-3:]]
        best = min(evaluated for _, evaluated in self._evaluations)
        widening = len(gaps) == 3 and gaps[0] < gaps[1] < gaps[2] and loss > best * (1 + self.limits.gap)
        return self._once(
            step,
            "gap",
            widening,
            f"overfitting: training loss {training:.3f}, evaluation loss {loss:.3f} (its best was {best:.3f}), and the gap is "
            "widening. Stop here, keep the best checkpoint (train.keep_best), or use fewer epochs, more rows, dropout or a "
            "smaller rank",
        )

    def gradients(self, step: int, norms: Mapping[str, float]) -> list[Finding]:
        """Note which tensors of the adapter (by name) had a gradient at this step; after `gradient_steps`, name those that
        never did. `norms` are gradient norms; a tensor without a gradient has norm 0."""
        if self._gradients_told:
            return []
        self._pending = set(norms) if self._pending is None else self._pending
        self._pending -= {name for name, norm in norms.items() if norm > 0}
        if step < self.limits.gradient_steps:
            return []
        self._gradients_told = True
        if not self._pending:
            return []
        layers = sorted({name.rpartition(".")[0] or name for name in self._pending})
        shown = ", ".join(layers[:6]) + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
        text = (
            f"{len(self._pending)} of the adapter's {len(norms)} tensors received no gradient in {step} steps, in {shown}. "
            "These layers do not take part in the loss (a layer never called, or cut off by a detach or a no_grad): leave "
            "them out of target_modules, or find what cuts them off"
        )
        return [self._found(step, "no_gradient", text)]

    @property
    def watches_gradients(self) -> bool:
        """Whether the per-tensor gradient norms are still wanted (they cost a pass over the adapter)."""
        return not self._gradients_told

    # One judgement each.

    def _not_finite(self, step: int, loss: float, gradient_norm: float) -> Finding:
        self.skipped += 1
        self.skipped_in_a_row += 1
        what, number = ("gradient", gradient_norm) if math.isfinite(loss) else ("loss", loss)
        seen = f"the {what} is {_number(number)}"
        if self.skipped_in_a_row < self.limits.stop_after:
            text = f"{seen}: the step was skipped, the parameters are unchanged ({self.skipped} skipped so far)"
            return self._found(step, "not_finite", text, "skipped")
        text = (
            f"{seen}; that makes {plural(self.skipped_in_a_row, 'such step')} in a row, so the run is stopped. The adapter "
            "is as it was before them. Try a lower learning rate or fp32, and look at the rows of these batches"
        )
        return self._found(step, "not_finite", text, "stopped")

    def _spike(self, step: int, loss: float) -> list[Finding]:
        if len(self._losses) < self.limits.window // 2:
            return []
        usual = median(self._losses)
        scatter = 1.4826 * median(abs(value - usual) for value in self._losses)
        # Small batches of short answers scatter widely by nature: both the factor and the scatter must be exceeded.
        return self._once(
            step,
            "spike",
            loss > self.limits.spike * usual and loss > usual + 6 * scatter,
            f"the loss jumped to {loss:.3f}, {loss / max(usual, 1e-12):.1f} times its running median {usual:.3f}. The step "
            "was taken. If it does not come back within some steps, lower the learning rate or lengthen the warm-up",
        )

    def _low_loss(self, step: int) -> list[Finding]:
        half = self.limits.window // 2
        if "low_loss" in self._present or len(self._losses) < half:
            return []
        usual = median(list(self._losses)[-half:])
        return self._once(
            step,
            "low_loss",
            usual < self.limits.low_loss,
            f"the training loss is {usual:.3f}, below {self.limits.low_loss}: the adapter may be memorising its rows. If the "
            "evaluation loss no longer falls, stop earlier or use more rows. With answers of one or two words a low loss is "
            "normal",
        )

    def _once(self, step: int, kind: Kind, present: bool, text: str) -> list[Finding]:
        """The finding of something that is told when it begins, and not again while it lasts."""
        if not present:
            self._present.discard(kind)
        elif kind not in self._present:
            self._present.add(kind)
            return [self._found(step, kind, text)]
        return []

    def _found(self, step: int, kind: Kind, text: str, action: Action = "told") -> Finding:
        self.findings.append(Finding(step, kind, action, text))
        return self.findings[-1]


class HealthCallback(TrainerCallback):
    """Connects a `HealthWatch` to a running Trainer: reads the gradient before each optimiser step, and lets the step pass,
    skips it (by taking the gradients away) or stops the run.

    The Trainer tells it the loss of every micro-batch through `add_loss`. On a GPU, reading a number waits for all that was
    asked of it, so a step is judged later there, with those before it, whenever the host reads something anyway: an optimizer
    that can skips a step that is not finite by itself, on the device. `at_once`: something else follows the judgement.
    """

    MOST_UNREAD = 64

    def __init__(self, watch: HealthWatch, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self.watch = watch
        self.stopped: str | None = None
        self.overflowed = False
        """Whether the loss scale of fp16 was too large for this step, which is then skipped as a matter of course."""
        self._parameters = dict(named_parameters)
        self._losses: list[Tensor] = []
        self._unread: list[tuple[int, list[str], Tensor]] = []
        self.at_once = False

    def add_loss(self, loss: Tensor) -> None:
        """Note one micro-batch's share of the step's loss (a detached scalar); the shares of a step add up."""
        self._losses.append(loss)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._losses.clear()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.overflowed:
            return
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))) if gradients else torch.zeros(1)
        total = torch.linalg.vector_norm(norms)
        loss = torch.stack(self._losses).sum().to(total) if self._losses else torch.zeros_like(total)
        judged = torch.stack([loss, total])
        numbers = torch.cat([judged, norms]) if self.watch.watches_gradients else judged
        self._unread.append((state.global_step + 1, list(gradients), numbers))
        optimizer: Any = getattr(given.get("optimizer"), "optimizer", None)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and self._judges_later(total.device):
            # as under a GradScaler, whose scale is 1
            optimizer.grad_scale, optimizer.found_inf = None, judged.isfinite().all().logical_not().to(torch.float32)
        else:
            self._read(control)

    def _judges_later(self, device: torch.device) -> bool:
        return device.type != "cpu" and not self.at_once

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        reads = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if reads or len(self._unread) >= self.MOST_UNREAD:
            self._read(control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._read(control)

    def _read(self, control: TrainerControl) -> None:
        """Judge the steps that have not been: one copy from the device."""
        unread, self._unread = self._unread, []
        values = iter(torch.cat([numbers for *_, numbers in unread]).tolist() if unread else ())
        for step, names, numbers in unread:
            loss, norm, *norms = (next(values) for _ in range(len(numbers)))
            found = self.watch.step(step, loss, norm)
            if any(finding.action != "told" for finding in found):
                for parameter in self._parameters.values():
                    parameter.grad = None  # an optimiser skips a tensor without a gradient: no decay, no moment
            elif self.watch.watches_gradients:
                known = dict(zip(names, norms, strict=False))
                found += self.watch.gradients(step, {name: known.get(name, 0.0) for name in self._parameters})
            self._say(found)
            for finding in found:
                if finding.action == "stopped":
                    self.stopped = str(finding)
                    control.should_training_stop = True
                    return

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        metrics = given.get("metrics") or {}
        if "eval_loss" in metrics:
            self._say(self.watch.evaluation(state.global_step, float(metrics["eval_loss"])))

    def _say(self, found: Iterable[Finding]) -> None:
        for finding in found:
            log.warning("health: %s", finding)


def _number(value: float) -> str:
    return "not a number" if math.isnan(value) else "infinite"
