"""What is wrong with a run is found before the weights of its base are read, and `lorakit train --check` stops there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the base is a failure here."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was read")

    monkeypatch.setattr("lorakit.train.run.load_model", read)


def test_the_check_shows_what_will_be_learned(config: Path, lorakit: Run, tmp_path: Path) -> None:
    done = lorakit("train", str(config), "--check", "--train.output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert "30 rows (prompt-completion)" in shown
    assert "⟦yes <end>⟧" in shown or "⟦no <end>⟧" in shown
    assert "on 14 layers: model.layers.0.self_attn.q_proj" in shown
    assert "steps: 120, batch size 4" in shown
    assert re.search(r"memory: [\d.,]+ MB: base .* gradients .* state of adamw .* activations ", shown), shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.optimizer", "adamm"], "adamm"),
        (["--train.optimizer", "LBFGS"], "use adamw"),
        (["--train.report-to", "tensorbord"], 'did you mean "tensorboard"'),
        (["--train.report-to", "neptune"], "pip install neptune"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--check"]])
def test_options_that_need_no_model(flags: list[str], said: str, more: list[str], config: Path, lorakit: Run) -> None:
    done = lorakit("train", str(config), *flags, *more)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target-modules", "q_proy"], "q_proy"),
        (["--set", "rank_pattern={q_proy: 2}"], "q_proy"),
        (["--modules-to-save", "haed"], "haed"),
        (["--data.columns", "{prompt: question}"], "question"),
        (["--train.keep-best", "true", "--train.save-steps", "3", "--train.eval-steps", "2"], "save_steps"),
    ],
)
def test_what_needs_the_shapes_or_the_rows(
    flags: list[str], said: str, config: Path, lorakit: Run, tmp_path: Path
) -> None:
    done = lorakit("train", str(config), "--check", "--train.output", str(tmp_path / "out"), *flags)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split()), done.stderr


def test_a_disk_that_is_too_small(config: Path, lorakit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.train.check.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    done = lorakit("train", str(config), "--check", "--train.output", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "GB free" in " ".join(done.stderr.split())


def test_init_writes_a_run_that_checks(base: Path, rows: Path, lorakit: Run, tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    done = lorakit("init", str(base), str(rows), "-o", str(out))
    assert done.exit_code == 0, done.output
    assert "40 rows (prompt-completion)" in done.stdout
    assert "# rows to train on" in out.read_text()
    done = lorakit("train", str(out), "--check", "--train.output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    before = out.read_text()
    assert lorakit("init", str(base), str(rows), "-o", str(out)).exit_code == 2
    assert out.read_text() == before
    assert lorakit("init", str(base), str(rows), "-o", str(out), "--overwrite").exit_code == 0


def test_sources_blocks_and_streams_are_shown(config: Path, rows: Path, lorakit: Run, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "the film was {word}"}}\n' for word in ("good", "bad", "good")))
    out = ("--train.output", str(tmp_path / "out"), "--data.evaluation-size", "0", "--evaluate.answers", "none")
    both = f"[{{path: {rows}, weight: 0.9}}, {{path: {texts}, format: text, weight: 0.1}}]"
    done = lorakit("train", str(config), "--check", *out, "--data.train", both, "--data.mix", "all-exhausted")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert "2 sources: 43 rows (prompt-completion and text)" in shown
    assert "texts.jsonl: 3 rows (text), " in shown
    done = lorakit("train", str(config), "--check", *out, "--data.train", str(texts), "--data.pack-to", "4")
    assert "12 tokens (" in done.stdout or "15 tokens (" in done.stdout, done.output
    assert "4 examples" in done.stdout
    done = lorakit("train", str(config), "--check", *out, "--data.streaming", "--data.train", str(rows))
    assert "(streamed; the first 40 rows)" in " ".join(done.stdout.split()), done.output
    done = lorakit("train", str(config), "--check", *out, "--data.train", "[{path: a.jsonl, colunms: {}}]")
    assert done.exit_code == 2
    assert 'did you mean "data.train.columns"' in " ".join(done.stderr.split())
