"""Edits by the same commands as deltas: trained from a file and flags, looked at, loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from transformers import LlamaForCausalLM

import lorakit as lk
from lorakit.edits import EDITS

FLAGS = {
    "bottleneck": ("--size", "4"),
    "prompt-tuning": ("--tokens", "3"),
    "p-tuning": ("--tokens", "3"),
    "prefix-tuning": ("--tokens", "3", "--width", "8"),
    "llama-adapter": ("--tokens", "3", "--top", "1"),
    "loreft": ("--rank", "2"),
}


@pytest.mark.parametrize("method", EDITS)
def test_an_edit_is_trained_inspected_and_loaded(
    method: str, base: Path, rows: Path, tmp_path: Path, lorakit: Callable[..., Result]
) -> None:
    folder = tmp_path / "edit"
    options = (
        "--data.evaluation-size",
        "6",
        "--train.precision",
        "fp32",
        "--train.max-steps",
        "2",
        "--train.compile",
        "off",
    )
    trained = lorakit(
        *("train", "--model", str(base), "--data.train", str(rows), "--method", method, *FLAGS[method], *options),
        *("--evaluate.answers", "score", "--evaluate.choices", "[yes, no]", "--train.output", str(folder)),
    )
    assert trained.exit_code == 0, trained.output
    assert "accuracy" in trained.stdout
    seen = lorakit("inspect", str(folder))
    assert seen.exit_code == 0, seen.output
    assert method in seen.stdout
    assert "ranks -" not in seen.stdout
    report = json.loads(lorakit("inspect", str(folder), "--json").stdout)
    model = LlamaForCausalLM.from_pretrained(base)
    adapter = lk.load(model, folder)
    assert adapter.method.name == method
    assert report["parameters"] > 0


def test_the_table_of_methods_has_the_edits(lorakit: Callable[..., Result]) -> None:
    shown = lorakit("methods", "--json")
    assert shown.exit_code == 0, shown.output
    assert set(EDITS) <= {row["name"] for row in json.loads(shown.stdout)}
