"""No verb shows a user a traceback: what other libraries and the operating system raise is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def broken(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(how: str) -> Path:
        folder = tmp_path / how
        shutil.copytree(base, folder)
        weights, config = folder / "model.safetensors", folder / "config.json"
        if how == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif how == "header":
            weights.write_bytes(b"\x00" * 40)
        else:
            config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "nothing-known"}))
        return folder

    return make


@pytest.mark.parametrize("how", ["truncated", "header", "unknown"])
@pytest.mark.parametrize("verb", ["generate", "train"])
def test_a_base_that_cannot_be_read_is_named(
    verb: str, how: str, broken: Callable[[str], Path], config: Path, lorakit: Run, tmp_path: Path
) -> None:
    folder = broken(how)
    if verb == "generate":
        result = lorakit("generate", str(folder), "--prompt", "a film")
    else:
        result = lorakit("train", str(config), f"--model={folder}", f"--train.output={tmp_path / 'a'}")
    assert result.exit_code == 2, result.output
    assert str(folder) in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output


def test_an_output_that_cannot_be_written_is_named(config: Path, lorakit: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = lorakit("train", str(config), "--train.max-steps=1", f"--train.output={tmp_path / 'file' / 'a'}")
    assert result.exit_code == 2, result.output
    assert str(tmp_path / "file") in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("shown", ["", "--debug", "LORAKIT_DEBUG"])
def test_what_nobody_foresaw_is_a_line_with_the_traceback_in_a_file(
    shown: str, lorakit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def planted(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(TyperGroup, "invoke", planted)
    if shown == "LORAKIT_DEBUG":
        monkeypatch.setenv(shown, "1")
    result = lorakit("methods", *(["--debug"] if shown == "--debug" else []))
    if shown:
        assert isinstance(result.exception, ZeroDivisionError)
        return
    assert result.exit_code == 1
    assert "ZeroDivisionError: planted" in result.stderr
    [log] = tmp_path.glob("lorakit-*.log")
    assert "Traceback" in log.read_text()
    assert str(log) in result.stderr.replace("\n", "")
