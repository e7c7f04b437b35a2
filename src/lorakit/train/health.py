"""A health watch over a run: it says in words what it sees, and what was done about it.

A run that goes wrong usually shows it in numbers nobody reads: a loss that is not a number, a jump, a
training loss that sinks while the evaluation loss climbs, a layer whose adapter never got a gradient.
`HealthWatch` is fed those numbers and answers with findings in plain words. It knows neither torch nor the
Trainer, so a test can feed it by hand; `HealthCallback` is the thin wire between it and a running Trainer.

What the watch *does* is deliberately little. A step whose loss or gradient is not finite is skipped whole
(the parameters and the optimiser's moments keep their values), and after a few of those in a row the run is
stopped, because the same data and the same weights would fail the same way again. Everything else is said,
not acted upon.
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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger("lorakit.train")

Kind = Literal["not_finite", "spike", "low_loss", "gap", "no_gradient"]
Action = Literal["told", "skipped", "stopped"]


@dataclass(frozen=True)
class Finding:
    """One thing the watch saw: at which optimiser step, what kind, what was done, and the sentence for a
    person."""

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
    `window`: how many recent losses the running median is taken over; nothing is judged before half of them
    are in.
    `spike`: a loss this many times the running median (and far outside its usual scatter) is a spike.
    `low_loss`: a running median below this asks whether the rows are being memorised.
    `gap`: the evaluation loss must be this share above its best before a widening gap is reported.
    `gradient_steps`: after how many steps every tensor of the adapter must have had a gradient once. Not one:
    half of a low-rank pair starts at zero, so the other half has no gradient at the first step, nor during a
    warm-up that begins at a learning rate of zero.
    """

    stop_after: int = 5
    window: int = 40
    spike: float = 2.0
    low_loss: float = 0.2
    gap: float = 0.05
    gradient_steps: int = 10


class HealthWatch:
    """Judges the numbers of a run. Feed it once per optimiser step; every method returns what is new to
    say."""

    def __init__(self, limits: HealthLimits | None = None) -> None:
        self.limits = limits or HealthLimits()
        self.findings: list[Finding] = []
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=self.limits.window)
        self._evaluations: list[tuple[float, float]] = []
        self._low_told = False
        self._gap_told = False
        self._in_spike = False
        self._pending: set[str] | None = None
        self._gradients_told = False

    def step(self, step: int, loss: float, gradient_norm: float) -> list[Finding]:
        """Judge one optimiser step before it is taken.

        `loss` is the mean training loss of the step, `gradient_norm` the norm of the adapter's whole
        gradient. The caller must not take the step when a finding's action is "skipped" or "stopped".
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return self._keep([self._not_finite(step, loss, gradient_norm)])
        self.skipped_in_a_row = 0
        new = [finding for finding in (self._spike(step, loss),) if finding is not None]
        self._losses.append(loss)
        low = self._low_loss(step)
        return self._keep(new if low is None else [*new, low])

    def evaluation(self, step: int, loss: float) -> list[Finding]:
        """Judge an evaluation loss against the training loss of the same stretch of the run."""
        if not math.isfinite(loss):
            return self._keep([Finding(step, "not_finite", "told", _eval_not_finite(loss))])
        if not self._losses:
            return []
        # The window is long for spikes; for the gap only what was trained since the last evaluations counts.
        training = median(list(self._losses)[-max(5, self.limits.window // 4) :])
        self._evaluations.append((training, loss))
        if len(self._evaluations) < 3:
            return []
        gaps = [evaluated - trained for trained, evaluated in self._evaluations[-3:]]
        best = min(evaluated for _, evaluated in self._evaluations)
        widening = gaps[0] < gaps[1] < gaps[2] and loss > best * (1 + self.limits.gap)
        if not widening:
            self._gap_told = False
            return []
        if self._gap_told:
            return []
        self._gap_told = True
        text = (
            f"the gap between training and evaluation loss is widening: training {training:.3f}, evaluation "
            f"{loss:.3f} (its best was {best:.3f}). The adapter is learning the training rows by heart: "
            "stop here, keep the best checkpoint (load_best_model_at_end), or use fewer epochs, more rows, "
            "dropout or a smaller rank"
        )
        return self._keep([Finding(step, "gap", "told", text)])

    def gradients(self, step: int, norms: Mapping[str, float]) -> list[Finding]:
        """Note which tensors of the adapter (by name) had a gradient at this step; after `gradient_steps`,
        name those that never did. `norms` are gradient norms; a tensor without a gradient has norm 0."""
        if self._gradients_told:
            return []
        if self._pending is None:
            self._pending = set(norms)
        self._pending -= {name for name, norm in norms.items() if norm > 0}
        if step < self.limits.gradient_steps:
            return []
        self._gradients_told = True
        if not self._pending:
            return []
        names = sorted(self._pending)
        layers = sorted({_layer_of(name) for name in names})
        shown = ", ".join(layers[:6]) + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
        text = (
            f"{len(names)} of the adapter's {len(norms)} tensors received no gradient in {step} steps, in "
            f"{shown}. These layers do not take part in the loss (a layer never called, or cut off by a "
            "detach or a no_grad): leave them out of target_modules, or find what cuts them off"
        )
        return self._keep([Finding(step, "no_gradient", "told", text)])

    @property
    def watches_gradients(self) -> bool:
        """Whether the per-tensor gradient norms are still wanted (they cost a pass over the adapter)."""
        return not self._gradients_told

    # One judgement each.

    def _not_finite(self, step: int, loss: float, gradient_norm: float) -> Finding:
        self.skipped += 1
        self.skipped_in_a_row += 1
        seen = (
            f"the loss is {_number(loss)}" if not math.isfinite(loss) else f"the gradient is {_number(gradient_norm)}"
        )
        if self.skipped_in_a_row >= self.limits.stop_after:
            text = (
                f"{seen}; this is the {_ordinal(self.skipped_in_a_row)} such step in a row, so the run is "
                "stopped. The adapter is as it was before them. A lower learning rate, fp32 instead of "
                "bf16 or fp16, or a look at the rows of these batches is what usually helps"
            )
            return Finding(step, "not_finite", "stopped", text)
        text = f"{seen}: the step was skipped, the parameters are unchanged ({self.skipped} skipped so far)"
        return Finding(step, "not_finite", "skipped", text)

    def _spike(self, step: int, loss: float) -> Finding | None:
        if len(self._losses) < self.limits.window // 2:
            return None
        usual = median(self._losses)
        scatter = 1.4826 * median(abs(value - usual) for value in self._losses)
        # Small batches of short answers scatter widely by nature: both the factor and the scatter must be
        # exceeded.
        spiked = loss > self.limits.spike * usual and loss > usual + 6 * scatter
        if not spiked:
            self._in_spike = False
            return None
        if self._in_spike:
            return None
        self._in_spike = True
        text = (
            f"the loss jumped to {loss:.3f}, {loss / max(usual, 1e-12):.1f} times its running median "
            f"{usual:.3f}. The step was taken. If it does not come back within some steps, lower the "
            "learning rate or lengthen the warm-up"
        )
        return Finding(step, "spike", "told", text)

    def _low_loss(self, step: int) -> Finding | None:
        if self._low_told or len(self._losses) < self.limits.window // 2:
            return None
        usual = median(list(self._losses)[-(self.limits.window // 2) :])
        if usual >= self.limits.low_loss:
            return None
        self._low_told = True
        text = (
            f"the training loss is {usual:.3f}, below {self.limits.low_loss}: the adapter may be memorising "
            "its rows. The evaluation loss decides: if it no longer falls, stop earlier or use more rows. "
            "With answers of one or two words a low loss is normal"
        )
        return Finding(step, "low_loss", "told", text)

    def _keep(self, new: list[Finding]) -> list[Finding]:
        self.findings.extend(new)
        return new


class HealthCallback(TrainerCallback):
    """Wires a `HealthWatch` to a running Trainer: reads the gradient before each optimiser step, and lets the
    step pass, skips it (by taking the gradients away) or stops the run.

    The Trainer tells it the loss of every micro-batch through `add_loss`.
    """

    def __init__(self, watch: HealthWatch, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self.watch = watch
        self.stopped: str | None = None
        self._parameters = dict(named_parameters)
        self._losses: list[Tensor] = []

    def add_loss(self, loss: Tensor) -> None:
        """Note one micro-batch's share of the step's loss (a detached scalar); the shares of a step add
        up."""
        self._losses.append(loss)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._losses.clear()
        return control

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        step = state.global_step + 1
        loss = float(torch.stack(self._losses).sum()) if self._losses else 0.0
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))) if gradients else torch.zeros(1)
        found = self.watch.step(step, loss, float(torch.linalg.vector_norm(norms)))
        if any(finding.action != "told" for finding in found):
            for parameter in self._parameters.values():
                parameter.grad = None  # an optimiser passes over a tensor without a gradient: no decay, no moment
        elif self.watch.watches_gradients:
            known = dict(zip(gradients, norms.tolist(), strict=False))
            found += self.watch.gradients(step, {name: known.get(name, 0.0) for name in self._parameters})
        self._say(found)
        for finding in found:
            if finding.action == "stopped":
                self.stopped = str(finding)
                control.should_training_stop = True
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> TrainerControl:
        if metrics is not None and "eval_loss" in metrics:
            self._say(self.watch.evaluation(state.global_step, float(metrics["eval_loss"])))
        return control

    def _say(self, found: Iterable[Finding]) -> None:
        for finding in found:
            log.warning("health: %s", finding)


def _layer_of(name: str) -> str:
    """The layer a tensor of the adapter belongs to: its name without the tensor's own last part."""
    return name.rpartition(".")[0] or name


def _number(value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def _eval_not_finite(loss: float) -> str:
    return f"the evaluation loss is {_number(loss)}: on some held-out row the model gives no probabilities"


def _ordinal(count: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}th" if count % 100 in (11, 12, 13) else f"{count}{ending}"
