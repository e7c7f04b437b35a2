"""The fastest of several ways is found by measuring, kept, and can be forced."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.native import choice
from lorakit.native.choice import FORCED, Way, fastest


def slow() -> None:
    time.sleep(2e-3)


def fast() -> None:
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    monkeypatch.delenv(FORCED, raising=False)
    choice._kept.cache_clear()
    return tmp_path


@pytest.mark.parametrize(("first", "second", "found"), [(slow, fast, "two"), (fast, slow, "one")])
def test_a_planted_slow_way_is_avoided(
    first: Callable[[], None], second: Callable[[], None], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lorakit"):
        assert fastest("linear", (3, 5), {"one": lambda: [first, fast], "two": lambda: [second, fast]}) == found
    assert caplog.text.count("native: linear 3x5 goes by") == 1


def test_it_is_measured_once_and_kept(cache: Path) -> None:
    calls = []
    ways: dict[str, Way] = {"one": lambda: [lambda: calls.append(1)], "two": lambda: [slow]}
    assert fastest("linear", (3, 5), ways) == "one"
    before = len(calls)
    assert fastest("linear", (3, 5), ways) == "one"
    choice._kept.cache_clear()  # another process
    assert fastest("linear", (3, 5), ways) == "one"
    assert len(calls) == before
    (file,) = cache.rglob("choices-*.json")
    assert json.loads(file.read_text()) == {"linear 3x5 one/two": "one"}
    fastest("linear", (3, 6), ways)
    assert len(calls) > before, "another shape is another choice"


def test_a_way_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "gate=torch,linear=two")
    assert fastest("linear", (3, 5), {"one": lambda: [fast], "two": lambda: [slow]}) == "two"
    assert fastest("linear", (3, 5), {"one": lambda: [fast]}) == "one", "a way that is not there cannot be"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"linear 3x5 one/two": "three"}'])
def test_a_broken_file_is_measured_anew(text: str) -> None:
    choice._file().parent.mkdir(parents=True, exist_ok=True)
    choice._file().write_text(text)
    assert fastest("linear", (3, 5), {"one": lambda: [fast], "two": lambda: [slow]}) == "one"
