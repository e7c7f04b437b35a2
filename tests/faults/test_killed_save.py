"""A save that is killed, fails or meets another leaves the old adapter or the new one, whole, and nobody's files lost.

Children are forked from here, so that each starts in milliseconds with everything imported. A child counts its calls of
the system that open, lock or change files, and kills itself before the n-th of them with SIGKILL, which no handler sees.
Every n is tried until the child comes through.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.files import folder as folder_module
from lorakit.files.store import CONFIG, OWN, TENSORS, load, read_config, read_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forked")

FILES = (CONFIG, TENSORS, OWN)
FOREIGN = {
    "README.md": "a card",
    "metrics.jsonl": '{"loss": 1}\n',
    "checkpoints/last/state.bin": "a checkpoint",
    "checkpoints/step-5/adapter_config.json": "its configuration",
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def adapter(value: float, rank: int) -> lk.Adapter:
    """An adapter that is told from others by its values and its rank."""
    made = lk.attach(model(), lk.LoRA(rank=rank), target_modules=["0", "1"])
    with torch.no_grad():
        for one in made.parameters():
            one.fill_(value)
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def foreign(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in FILES)
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def write_foreign(folder: Path) -> None:
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def child(work: Callable[[], None]) -> int:
    """Run in a forked child; returns how it ended: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException as problem:
            os.write(2, f"{type(problem).__name__}: {problem}\n".encode())
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


STEPS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "ctypes.dlsym",
    "fcntl.flock",
    "shutil.rmtree",
)


def killed_at(step: int, work: Callable[[], None]) -> None:
    """Run `work` and kill this process just before its n-th call of the system; between two calls nothing changes."""
    left = step

    def audit(event: str, _: Any) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    work()


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk, which a killed process does not lose."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways to replace a folder: in one step, or where the system cannot, by two renames."""
    if request.param == "renames":
        monkeypatch.setattr(folder_module, "exchange", lambda first, second: False)
    return str(request.param)


def test_the_system_here_can_exchange_folders(tmp_path: Path) -> None:
    """Otherwise the tests of the first way would be tests of the second."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if sys.platform not in ("linux", "darwin") or not folder_module.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two folders")
    assert (tmp_path / "a" / "b").exists()


def test_killed_at_every_step_of_replacing(way: str, unflushed: None, tmp_path: Path) -> None:
    old, new = adapter(1.0, rank=1), adapter(2.0, rank=2)
    whole = {}
    for name, one in (("old", old), ("new", new)):
        one.save(tmp_path / name)
        whole[name] = content(tmp_path / name)
    step, seen = 0, set()
    while True:
        step += 1
        place = tmp_path / str(step)
        target = place / "sql"
        old.save(target)
        write_foreign(target)
        ended = child(lambda step=step, target=target: killed_at(step, lambda: new.save(target)))
        assert ended in (0, -signal.SIGKILL)
        # As any program finds it, before lorakit touches it again.
        if way == "exchange" or target.exists():
            assert content(target) in (whole["old"], whole["new"]), f"a mixture after step {step}"
            seen.add("new" if content(target) == whole["new"] else "old")
        # As lorakit's next reader or writer finds it.
        reader = load(model(), target, name="a")
        expected = 1.0 if content(target) == whole["old"] else 2.0
        assert all(bool((one == expected).all()) for one in reader.parameters())
        assert foreign(target) == FOREIGN, f"others' files after step {step}"
        assert [entry.name for entry in place.iterdir()] == ["sql"], f"leftovers after step {step}"
        if step % 7 == 0:
            old.save(target)
            assert content(target) == whole["old"]
            assert foreign(target) == FOREIGN
        if ended == 0:
            break
    assert step > 25, "the child is meant to be killed at many places"
    assert seen == {"old", "new"}


def test_a_save_in_place_would_be_seen(unflushed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the files written one by one into the folder itself. Some kill then leaves a mixture."""
    monkeypatch.setattr("lorakit.files.store.replace_folder", lambda folder, write, content: write(folder))
    old, new = adapter(1.0, rank=1), adapter(2.0, rank=2)
    mixtures = 0
    for step in range(1, 12):
        target = tmp_path / str(step) / "sql"
        target.mkdir(parents=True)
        old.save(target)
        before = content(target)
        ended = child(lambda step=step, target=target: killed_at(step, lambda: new.save(target)))
        found = content(target)
        new.save(target)
        mixtures += found not in (before, content(target))
        if ended == 0:
            break
    assert mixtures


def test_killed_at_every_step_of_the_first_save(unflushed: None, tmp_path: Path) -> None:
    """Where nothing was, there is nothing or the whole adapter; the next save clears what was left."""
    new = adapter(2.0, rank=2)
    new.save(tmp_path / "whole")
    step = 0
    while True:
        step += 1
        target = tmp_path / str(step) / "sql"
        ended = child(lambda step=step, target=target: killed_at(step, lambda: new.save(target)))
        assert ended in (0, -signal.SIGKILL)
        assert content(target) in ({}, content(tmp_path / "whole"))
        if not target.exists():
            with pytest.raises(LorakitError, match="is no folder"):
                load(model(), target)
        new.save(target)
        assert content(target) == content(tmp_path / "whole")
        assert [entry.name for entry in target.parent.iterdir()] == ["sql"]
        if ended == 0:
            break
    assert step > 12


def test_killed_between_kills(way: str, unflushed: None, tmp_path: Path) -> None:
    """Recovery itself may be killed, again and again."""
    old, new = adapter(1.0, rank=1), adapter(2.0, rank=2)
    target = tmp_path / "sql"
    old.save(target)
    write_foreign(target)
    for step in range(3, 40, 2):
        child(lambda step=step: killed_at(step, lambda: (new if step % 4 == 3 else old).save(target)))
    load(model(), target)
    assert foreign(target) == FOREIGN
    assert [entry.name for entry in tmp_path.iterdir()] == ["sql"]


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    """A real failure of the system's write: the child may write small files only."""
    old = adapter(1.0, rank=1)
    target = tmp_path / "sql"
    old.save(target)
    write_foreign(target)
    before = content(target)
    big = lk.attach(nn.Sequential(nn.Linear(64, 64)), lk.LoRA(rank=32), target_modules=["0"])

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(LorakitError, match=r"save: .*sql could not be written .*what was there is as it was"):
            big.save(target)

    assert child(work) == 0
    assert content(target) == before
    assert foreign(target) == FOREIGN
    assert [entry.name for entry in tmp_path.iterdir()] == ["sql"]


@pytest.mark.parametrize("step", ["fsync", "link", "rename"])
def test_a_failing_call_leaves_the_old_adapter(
    step: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = adapter(1.0, rank=1), adapter(2.0, rank=2)
    target = tmp_path / "sql"
    old.save(target)
    write_foreign(target)
    before = content(target)
    real, calls = getattr(os, step), []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(args)
        # Of two renames the second fails: the first has taken the old folder away by then.
        if step != "rename" or len(calls) == (1 if way == "exchange" else 2):
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(os, step, fail)
    if step == "link" or (step == "rename" and way == "exchange"):
        # Without hard links files are moved instead. After an exchange the new adapter is in place, and others' files
        # that could not be moved wait for the next save or load.
        new.save(target)
        monkeypatch.undo()
        assert content(target) != before
    else:
        with pytest.raises(LorakitError, match=r"could not be written .*No space left"):
            new.save(target)
        monkeypatch.undo()
        assert content(target) == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["sql"]
    assert calls
    load(model(), target)
    assert foreign(target) == FOREIGN
    assert [entry.name for entry in tmp_path.iterdir()] == ["sql"]


def test_interrupted_after_the_exchange(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when the new adapter is in place: others' files, still in the old folder, are not cleaned up with it."""
    old, new = adapter(1.0, rank=1), adapter(2.0, rank=2)
    target = tmp_path / "sql"
    old.save(target)
    write_foreign(target)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "_absorb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        new.save(target)
    monkeypatch.undo()
    assert read_config(target)["r"] == 2
    assert foreign(target) == FOREIGN
    assert [entry.name for entry in tmp_path.iterdir()] == ["sql"]


def test_two_processes_at_once(way: str, unflushed: None, tmp_path: Path) -> None:
    """Many saves of two processes to one folder, and a reader that never finds anything but a whole adapter."""
    adapters = [adapter(1.0, rank=1), adapter(2.0, rank=2)]
    target = tmp_path / "sql"
    adapters[0].save(target)
    write_foreign(target)
    children = []
    for one in adapters:
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                for _ in range(25):
                    one.save(target)
                os._exit(0)
            except BaseException as problem:
                os.write(2, f"{type(problem).__name__}: {problem}\n".encode())
                os._exit(1)
        children.append(pid)
    seen = set()
    running = list(children)
    while running:
        read = load(model(), target, name="a")
        values = {float(one.min()) for one in read.parameters()} | {float(one.max()) for one in read.parameters()}
        assert len(values) == 1
        assert read.method.rank == values.copy().pop()  # type: ignore[attr-defined]
        seen |= values
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0
                running.remove(pid)
    load(model(), target, name="a")
    assert foreign(target) == FOREIGN
    assert [entry.name for entry in tmp_path.iterdir()] == ["sql"]


def test_the_folder_is_away_while_its_place_is_checked(unflushed: None, tmp_path: Path) -> None:
    """By renames another save takes the folder away for a moment; here at every single question about it, in turn."""
    one = adapter(1.0, rank=1)
    target = tmp_path / "sql"
    one.save(target)
    for away in range(1, 20):
        asked = 0

        def answer(real: Callable[..., Any], away: int, path: Any, *args: Any, **options: Any) -> Any:
            nonlocal asked
            if not isinstance(path, int) and os.fspath(path) == str(target):
                asked += 1
                if asked == away:
                    raise FileNotFoundError(2, "No such file or directory", str(path))
            return real(path, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("stat", "lstat"):
                patch.setattr(os, name, partial(answer, getattr(os, name), away))
            folder_module.check_place(target)
        if asked < away:
            break
    assert away > 2, "it is meant to ask"


def test_a_living_save_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and saving do not take the unfinished folder of another save for a leftover."""
    slow, quick = adapter(1.0, rank=1), adapter(2.0, rank=2)
    target = tmp_path / "sql"
    quick.save(target)
    started, go = threading.Event(), threading.Event()
    real = os.fsync

    def wait(handle: int) -> None:
        if threading.current_thread() is thread:
            started.set()
            assert go.wait(30)
        real(handle)

    monkeypatch.setattr(os, "fsync", wait)
    thread = threading.Thread(target=lambda: slow.save(target))
    thread.start()
    assert started.wait(30)
    assert len(list(tmp_path.iterdir())) == 2
    load(model(), target)
    quick.save(target)
    assert len(list(tmp_path.iterdir())) == 2
    assert read_config(target)["r"] == 2
    go.set()
    thread.join()
    assert read_config(target)["r"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["sql"]


def test_files_written_during_the_exchange_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone writes metrics.jsonl anew between the exchange and the move of the old one: both are kept."""
    old, new = adapter(1.0, rank=1), adapter(2.0, rank=2)
    target = tmp_path / "sql"
    old.save(target)
    write_foreign(target)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "no hard links here")))
    real = folder_module.exchange

    def meanwhile(first: Path, second: Path) -> bool:
        done = real(first, second)
        if done:
            (second / "metrics.jsonl").write_text("anew")
            (second / "checkpoints").mkdir()
            (second / "checkpoints" / "more").write_text("one more")
        return done

    monkeypatch.setattr(folder_module, "exchange", meanwhile)
    new.save(target)
    found = foreign(target)
    kept = [name for name in found if name.startswith("metrics.jsonl.")]
    assert found["metrics.jsonl"] == "anew"
    assert len(kept) == 1
    assert found[kept[0]] == FOREIGN["metrics.jsonl"]
    assert found["checkpoints/more"] == "one more"
    assert found["checkpoints/last/state.bin"] == "a checkpoint"


def test_reading_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading needs no right to write, also beside what a killed save left."""
    adapter(1.0, rank=1).save(tmp_path / "sql")
    (tmp_path / ".sql.saving-0123").mkdir()

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "read-only")

    for name in ("rename", "rmdir", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, deny)
    monkeypatch.setattr("shutil.rmtree", deny)
    load(model(), tmp_path / "sql")


def test_an_open_file_goes_on(tmp_path: Path) -> None:
    """A metrics file held open for appending is the same file after the folder was replaced."""
    one = adapter(1.0, rank=1)
    target = tmp_path / "sql"
    one.save(target)
    with (target / "metrics.jsonl").open("a") as file:
        file.write("first\n")
        one.save(target)
        file.write("second\n")
    assert (target / "metrics.jsonl").read_text() == "first\nsecond\n"


def test_tensors_read_outlive_their_file(tmp_path: Path) -> None:
    """What was read is not a view of a file that the next save replaces."""
    adapter(1.0, rank=1).save(tmp_path / "sql")
    tensors = read_tensors(tmp_path / "sql")
    adapter(2.0, rank=1).save(tmp_path / "sql")
    assert all(bool((one == 1.0).all()) for one in tensors.values())
    assert set(load_file(tmp_path / "sql" / TENSORS)) == set(tensors)
    assert json.loads((tmp_path / "sql" / OWN).read_text())["format"] == 1
    assert multiprocessing.active_children() == []
