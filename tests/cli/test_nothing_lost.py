"""Nothing is lost: one policy for every verb that writes, one run for a folder, full disks, Ctrl-C and SIGTERM."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from lorakit.errors import LorakitError
from lorakit.files.folder import claim, write_whole
from lorakit.files.prompt import read_prompt
from lorakit.train import run_checkpoint as checkpoint
from lorakit.train.interruption import Interruption
from lorakit.train.trainer import LoraTrainer

Run = Callable[..., Result]

VERBS: dict[str, list[str]] = {
    "train": ["train", "{config}", "--train.max-steps", "2", "--evaluate.answers", "none", "--train.output", "{out}"],
    "resize": ["resize", "{adapter}", "--rank", "2", "-o", "{out}"],
    "scale": ["scale", "{adapter}", "0.5", "-o", "{out}"],
    "combine": ["combine", "{adapter}", "{adapter}", "--how", "linear", "-o", "{out}"],
    "merge": ["merge", "{base}", "{adapter}", "-o", "{out}"],
    "convert": ["convert", "{adapter}", "--to", "mlx", "-o", "{out}"],
    "extract": ["extract", "{base}", "{merged}", "--rank", "2", "-o", "{out}"],
}
OWN = {"notes.md": "mine", "data/rows.jsonl": "mine too"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.cli.conftest import call

    folder = tmp_path_factory.mktemp("merged") / "model"
    assert call("merge", str(base), str(adapter), "-o", str(folder)).exit_code == 0
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_a_result_is_never_replaced_unasked(
    verb: str, base: Path, adapter: Path, merged: Path, config: Path, lorakit: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    places = {"base": base, "adapter": adapter, "merged": merged, "config": config, "out": out}
    words = [word.format(**places) for word in VERBS[verb]]
    first = lorakit(*words)
    assert first.exit_code == 0, first.output
    for name, text in OWN.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    before = content(out)
    again = lorakit(*words)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert content(out) == before
    asked = lorakit(*words, "--overwrite")
    assert asked.exit_code == 0, asked.output
    assert {name: (out / name).read_text() for name in OWN} == OWN
    assert set(content(out)) == set(before)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_users_own_files_are_never_replaced(more: list[str], config: Path, lorakit: Run, tmp_path: Path) -> None:
    out = tmp_path / "project"
    out.mkdir()
    (out / "README.md").write_text("my project")
    done = lorakit("train", str(config), "--train.output", str(out), *more)
    assert done.exit_code == 2
    assert "README.md" in done.stderr
    assert content(out) == {"README.md": b"my project"}


def test_an_output_that_cannot_be_written_is_said_before_anything_is_read(
    config: Path, lorakit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was read")

    monkeypatch.setattr("lorakit.train.run.load_model", read)
    (tmp_path / "file").write_text("x")
    for place, said in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "cannot be written")):
        done = lorakit("train", str(config), "--train.output", str(place))
        assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    done = lorakit("train", str(config), "--train.output", str(tmp_path / "new"), "--train.resume", "true")
    assert "found no complete checkpoint" in done.stderr
    assert not (tmp_path / "new").exists()  # and it leaves nothing behind


def _hold(output: Path, ready: Any) -> None:
    with checkpoint.claimed(output, resume=False, overwrite=False):
        ready.set()
        signal.pause()


def test_two_runs_cannot_write_one_folder_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "out", ready))
    other.start()
    assert ready.wait(20)
    with pytest.raises(LorakitError, match="another run is writing"), checkpoint.claimed(tmp_path / "out", False, True):
        pass
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with checkpoint.claimed(tmp_path / "out", False, False):
        pass
    assert not (tmp_path / "out").exists()


def test_what_a_run_that_failed_early_leaves_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0, "step": 10}\n')
    with checkpoint.claimed(tmp_path, False, False):
        pass
    (tmp_path / "metrics.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(LorakitError, match=r"metrics\.jsonl"), checkpoint.claimed(tmp_path, False, False):
        pass


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    number: signal.Signals, status: int, config: Path, lorakit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", str(config), "--train.max-steps", "6", "--evaluate.answers", "none"]
    assert lorakit(*words, "--train.output", str(tmp_path / "whole")).exit_code == 0
    step = LoraTrainer.training_step

    def killed(self: LoraTrainer, *given: Any, **named: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            os.kill(os.getpid(), number)
        return step(self, *given, **named)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    words += ["--train.output", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(LoraTrainer, "training_step", killed)
        done = lorakit(*words)
    assert done.exit_code == status, done.output
    assert "after step 3 of 6" in done.stderr
    assert "--train.resume true" in done.stderr
    (made,) = checkpoint.checkpoints_in(tmp_path / "out")
    assert made.name == "checkpoint-3"
    unfinished = lorakit("inspect", str(tmp_path / "out"))
    assert (unfinished.exit_code, str(made) in unfinished.stderr) == (2, True), unfinished.output
    assert lorakit("inspect", str(made)).exit_code == 0
    prompt = read_prompt(made)
    assert prompt is not None
    assert prompt.stop
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    done = lorakit(*words)
    assert "holds an unfinished run" in done.stderr
    done = lorakit(*words, "--train.resume", "true")
    assert done.exit_code == 0, done.output
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_second_signal_ends_at_once() -> None:
    watch = Interruption()
    with watch.watching():
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.caught == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_full_disk_costs_the_present_checkpoint_alone(
    config: Path, lorakit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save, calls = checkpoint.save_file, []

    def full(*given: Any, **named: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*given, **named)

    monkeypatch.setattr(checkpoint, "save_file", full)
    words = ["train", str(config), "--train.max-steps", "6", "--train.save-steps", "2", "--evaluate.answers", "none"]
    with caplog.at_level(logging.ERROR, logger="lorakit.train"):
        done = lorakit(*words, "--train.output", str(tmp_path / "out"), "--train.save-total-limit", "5")
    assert done.exit_code == 0, done.output
    assert "checkpoint-4 could not be written" in done.stderr + caplog.text
    assert [one.name for one in checkpoint.checkpoints_in(tmp_path / "out")] == ["checkpoint-2", "checkpoint-6"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_one_way_to_write_a_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "keys.yaml", b"secret", mode=0o600)
    assert (tmp_path / "a" / "keys.yaml").stat().st_mode & 0o777 == 0o600
    write_whole(tmp_path / "a" / "keys.yaml", b"other", mode=0o600)
    assert (tmp_path / "a" / "keys.yaml").read_bytes() == b"other"
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["keys.yaml"]
    with pytest.raises(LorakitError, match="is there already"):
        claim(tmp_path / "a" / "keys.yaml", (), False, "convert")
    claim(tmp_path / "a" / "keys.yaml", (), True, "convert")
