"""What a person sees while a run goes: a bar with loss, tokens per second and time left, or plain lines in a log.

The bar is Rich's, at the bottom of a terminal; where the output is a file or a pipe, one line per log event is printed
instead. `MetricsFile` keeps `metrics.jsonl` up to date while the run goes, so that a run that dies leaves what it measured.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from lorakit.files.folder import write_whole
from lorakit.train.evaluate import in_words
from lorakit.train.report import duration, json_lines


class Pace:
    """Steps and tokens per second over the last steps. The first step, which may compile, counts only while it is the
    only one."""

    def __init__(self, window: int = 20) -> None:
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=window + 1)
        self._count = 0

    def mark(self, step: int, tokens: int, now: float | None = None) -> None:
        """Note that by now so many steps and tokens are done."""
        self._marks.append((time.perf_counter() if now is None else now, step, tokens))
        self._count += 1
        if self._count == 3:
            self._marks.popleft()

    @property
    def tokens_per_second(self) -> float:
        """Real tokens (no padding) per second; 0 before the first step is over."""
        (start, _, first), (end, _, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def seconds_left(self, steps: int) -> float | None:
        """Time for `steps` more steps at the present pace; None before the first step is over."""
        (start, first, _), (end, last, _) = self._marks[0], self._marks[-1]
        return steps * (end - start) / (last - first) if last > first else None


class ProgressCallback(TrainerCallback):
    """Shows a running Trainer: a bar on a terminal, else a line per log event."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.loss: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._pace = Pace()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pace.mark(state.global_step, state.num_input_tokens_seen)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, numbers="")
            self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pace.mark(state.global_step, state.num_input_tokens_seen)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step, numbers=self._numbers(state))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs: dict[str, float] = given.get("logs") or {}
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" in logs and (self._bar is not None or state.is_world_process_zero):
            self.console.print(evaluation_line(state.global_step, logs), highlight=False)
        elif "loss" in logs and self._bar is None and state.is_world_process_zero:
            accuracy = f", token accuracy {100 * logs['token_accuracy']:.0f}%" if "token_accuracy" in logs else ""
            line = f"step {state.global_step}/{state.max_steps}: {self._numbers(state)}{accuracy}"
            self.console.print(line, highlight=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; also when the run ended by an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _numbers(self, state: TrainerState) -> str:
        left = self._pace.seconds_left(state.max_steps - state.global_step)
        parts = [
            f"loss {self.loss:.3f}" if self.loss is not None else "",
            f"{self._pace.tokens_per_second:,.0f} tokens/s",
            f"{duration(left)} left" if left is not None else "",
        ]
        return ", ".join(part for part in parts if part)


class MetricsFile(TrainerCallback):
    """Keeps `metrics.jsonl` equal to the log history while a run goes; a resumed run begins with what it resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_whole(self.path, json_lines(state.log_history).encode())

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            with self.path.open("a") as file:
                file.write(json_lines(state.log_history[-1:]))


def evaluation_line(step: int, logs: dict[str, float]) -> str:
    """An evaluation in one line."""
    names = ("loss", "perplexity", "token_accuracy")
    numbers = {name: logs[f"eval_{name}"] for name in names if f"eval_{name}" in logs}
    return f"evaluation at step {step}: {in_words(numbers)}"
