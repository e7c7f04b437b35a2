"""What a person is shown while a run goes: the pace, and plain lines where there is no terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from lorakit.train.progress import MetricsFile, Pace, ProgressCallback, evaluation_line
from lorakit.train.report import duration


def test_the_pace_forgets_the_first_step_as_soon_as_there_is_another() -> None:
    pace = Pace()
    pace.mark(0, 0, now=0.0)
    assert pace.tokens_per_second == 0
    assert pace.seconds_left(5) is None
    pace.mark(1, 100, now=50.0)
    assert pace.tokens_per_second == 2
    pace.mark(2, 300, now=51.0)
    assert pace.tokens_per_second == 200
    assert pace.seconds_left(5) == 5


def test_the_pace_is_that_of_the_last_steps() -> None:
    pace = Pace(window=2)
    for step, now in enumerate([0.0, 9.0, 18.0, 19.0, 20.0]):
        pace.mark(step, 10 * step, now=now)
    assert pace.tokens_per_second == 10


@pytest.mark.parametrize(("seconds", "words"), [(8.4, "8 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_times_are_as_coarse_as_a_person_wants_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_there_is_a_line_for_each_event() -> None:
    stream = io.StringIO()
    callback = ProgressCallback(Console(file=stream, width=200))
    state, control = TrainerState(max_steps=10), TrainerControl()
    callback.on_train_begin(None, state, control)
    state.global_step = 4
    callback.on_log(None, state, control, logs={"loss": 0.5, "token_accuracy": 0.25})
    callback.on_log(None, state, control, logs={"eval_loss": 0.25, "eval_perplexity": 1.284})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 4/10: loss 0.500")
    assert lines[0].endswith("token accuracy 25%")
    assert lines[1] == "evaluation at step 4: loss 0.2500, perplexity 1.28"


def test_on_a_terminal_there_is_a_bar_that_goes_away() -> None:
    stream = io.StringIO()
    callback = ProgressCallback(Console(file=stream, width=100, force_terminal=True))
    state, control = TrainerState(max_steps=10), TrainerControl()
    callback.on_train_begin(None, state, control)
    state.global_step = 4
    state.num_input_tokens_seen = 1234
    callback.loss = 0.5
    callback.on_step_end(None, state, control)
    callback.on_train_end(None, state, control)
    callback.close()
    assert "4/10" in stream.getvalue()
    assert "loss 0.500" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()


def test_the_metrics_file_begins_with_what_was_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    callback, state, control = MetricsFile(path), TrainerState(), TrainerControl()
    state.log_history = [{"step": 1}, {"step": 2}]
    callback.on_train_begin(None, state, control)
    state.log_history.append({"step": 3, "loss": 0.5})
    callback.on_log(None, state, control)
    assert [json.loads(line) for line in path.read_text().splitlines()] == state.log_history


def test_an_evaluation_is_one_line() -> None:
    assert evaluation_line(7, {"eval_loss": 1.0, "eval_token_accuracy": 0.5}).endswith("token accuracy 50.0%")
