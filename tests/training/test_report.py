"""What a run leaves behind: the card says what the run was, the metrics are valid JSON, the picture is a
picture."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from lorakit.errors import LorakitError
from lorakit.files import folder
from lorakit.train.evaluate import Answer, Evaluation
from lorakit.train.report import RunRecord, draw_curves, json_lines, model_card, series_of, write_report

RECORD = RunRecord(
    name="reviews",
    base="HuggingFaceTB/SmolLM2-135M-Instruct",
    method="LoRA",
    method_options={"rank": 16, "alpha": 32.0, "dropout": 0.05, "rslora": False},
    targets="all-linear",
    parameters=4_884_480,
    base_parameters=134_515_008,
    dtype="bfloat16",
    path="no padding, shared prefixes computed once",
    train_rows=2000,
    eval_rows=500,
    data=["examples/reviews.jsonl: 2,000 rows, none truncated"],
    steps=125,
    epochs=1.0,
    batch_size=16,
    learning_rate=5e-4,
    seed=0,
    tokens=123_456,
    seconds=100.0,
    versions={"lorakit": "0.1.0", "torch": "2.13.0"},
    before=Evaluation(rows=500, loss=2.5, perplexity=12.18, accuracy=0.744),
    after=Evaluation(rows=500, loss=0.25, perplexity=1.28, accuracy=0.88),
    samples=[Answer("A|b `c`\nd", "good", "bad", right=False)],
    findings=["step 9: the loss jumped to 5.0"],
    prompt="Review: a film\nAnswer:",
)

HISTORY = [
    *({"step": s, "loss": 2 / s, "learning_rate": 1e-3 / s, "token_accuracy": 1 - 1 / (s + 1)} for s in range(1, 30)),
    {"step": 15, "eval_loss": 0.3, "eval_token_accuracy": 0.8},
    {"step": 29, "eval_loss": math.nan},
]


def test_the_card_says_what_the_run_was() -> None:
    card = model_card(RECORD)
    for fact in (
        "16",
        "32",
        "all-linear",
        "4,884,480",
        "3.63%",
        "2,000 rows, 500 held out",
        "none truncated",
        "74.4%",
        "88.0%",
        "0.0005",
        "torch 2.13.0",
        "the loss jumped",
        "How to use it",
        "Limits",
        'adapter = lk.load(model, "path/to/this/folder")',
        "PeftModel.from_pretrained",
        "curves.png",
        "expected `good`",
        "A prompt from its training data:\n\n~~~\nReview: a film\nAnswer:\n~~~",
    ):
        assert fact in card, fact
    header, _, _ = card.removeprefix("---\n").partition("\n---")
    import yaml

    assert yaml.safe_load(header)["base_model"] == RECORD.base


def test_the_card_of_a_run_without_evaluation_claims_no_result() -> None:
    card = model_card(dataclasses.replace(RECORD, before=None, after=None, eval_rows=0, findings=(), stopped="NaN"))
    assert "Not evaluated" in card
    assert "its quality is unknown" in card
    assert "The run was stopped before its end: NaN" in card
    assert "No NaNs, spikes or overfitting were detected." in card


def test_a_folder_gets_its_four_files_and_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("old")
    write_report(tmp_path, RECORD, "rank: 16\n", HISTORY)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "README.md",
        "train.yaml",
        "metrics.jsonl",
        "curves.png",
    }
    assert (tmp_path / "train.yaml").read_text() == "rank: 16\n"
    assert (tmp_path / "README.md").read_text() == model_card(RECORD)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [event["step"] for event in HISTORY]
    assert events[-1]["eval_loss"] is None, "NaN is not JSON"
    assert (tmp_path / "README.md").stat().st_mode & 0o044, "others may read what is meant to be shared"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.yaml").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(folder.os, "replace", fail)
    with pytest.raises(LorakitError, match="disk full"):
        folder.write_whole(tmp_path / "train.yaml", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
    assert (tmp_path / "train.yaml").read_text() == "old"


def test_curves_are_read_from_the_events_that_hold_them() -> None:
    curves = series_of(HISTORY)
    assert curves["loss"][0] == (1, 2.0)
    assert len(curves["loss"]) == len(curves["learning_rate"]) == len(curves["token_accuracy"]) == 29
    assert curves["eval_loss"] == [(15, 0.3)], "a loss that is not a number cannot be drawn"
    assert curves["eval_token_accuracy"] == [(15, 0.8)]


@pytest.mark.parametrize("history", [[], HISTORY[:1], HISTORY[:5], HISTORY])
def test_any_history_can_be_drawn(history: list[dict[str, float]]) -> None:
    assert draw_curves(series_of(history), "title").startswith(b"\x89PNG")


def test_the_record_is_plain_json() -> None:
    plain = json.loads(json.dumps(RECORD.as_dict()))
    assert plain["after"] == {"rows": 500, "loss": 0.25, "perplexity": 1.28, "accuracy": 0.88}
    assert plain["method_options"]["rank"] == 16


def test_json_lines_end_every_event() -> None:
    assert json_lines([{"step": 1}, {"step": 2, "loss": math.inf}]) == '{"step": 1}\n{"step": 2, "loss": null}\n'
