"""Ctrl-C and SIGTERM end a run where it can go on: after the step that is being made, with a checkpoint.

A second Ctrl-C ends at once. Handlers are only set in a program's main thread, where alone the system allows it.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from lorakit.errors import LorakitError

log = logging.getLogger("lorakit.train")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(LorakitError):  # noqa: N818 - what happened, not what is wrong
    """A run was ended by a signal, with a checkpoint; `status` is the exit status that says so (130, 143)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Interruption(TrainerCallback):
    """Ends a run after the step in which a signal came, and has a checkpoint written."""

    def __init__(self) -> None:
        self.caught: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch the signals while the block runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        log.warning(
            "%s: finishing this step and writing a checkpoint; once more ends at once", signal.Signals(number).name
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.caught is not None:
            control.should_training_stop = control.should_save = True

    def check(self, output: Path, step: int, steps: int) -> None:
        """Raises `Interrupted`, with how to go on, if a signal ended the run before its last step."""
        if self.caught is None or step >= steps:
            return
        name = signal.Signals(self.caught).name
        raise Interrupted(
            f"train: stopped by {name} after step {step:,} of {steps:,}; the checkpoint is in "
            f"{output / 'checkpoints'}. Resume with the same command and --train.resume true",
            128 + self.caught,
        )
