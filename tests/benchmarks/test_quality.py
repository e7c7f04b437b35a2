"""The quality benchmark: its rows are runs that lorakit accepts, and its verdicts are what the figures say."""

from __future__ import annotations

from typing import Any

import pytest

import lorakit.edits
from lorakit.files.table import TABLE
from lorakit.methods import METHODS
from lorakit.train import load_config
from quality.settings import BASELINE, EDITS, SETTINGS, Setting
from quality.tables import claims, no_better, quality_table


def row(name: str, accuracies: list[float], **more: Any) -> dict[str, Any]:
    runs = [
        {
            "accuracy": accuracy,
            "loss": 0.5,
            "losses": more.get("losses", [1.0] * 10),
            "trained": 10,
            "file_bytes": 4e6,
            "processor_seconds": 3.0,
            "memory_peak": 1e9,
            "ranks": more.get("ranks", []),
            "half": more.get("half", 0.5),
        }
        for accuracy in accuracies
    ]
    return {"name": name, "learning_rate": 1e-3, "note": "", "runs": runs}


@pytest.mark.parametrize("setting", [*SETTINGS, *EDITS], ids=lambda setting: setting.name)
def test_every_row_is_a_run_that_is_accepted(setting: Setting) -> None:
    config = load_config(None, ["model=m", "data.train=rows.jsonl", *setting.flags])
    assert config.method.name in TABLE


def test_every_method_has_a_row() -> None:
    configs = [load_config(None, ["model=m", "data.train=rows.jsonl", *setting.flags]) for setting in SETTINGS]
    # SmolLM2 has no biases, and the task no new tokens
    assert {config.method.name for config in configs} == set(METHODS) - {"bitfit", "trainable-tokens"}
    configs = [load_config(None, ["model=m", "data.train=rows.jsonl", *setting.flags]) for setting in EDITS]
    assert {config.method.name for config in configs} == set(lorakit.edits.EDITS)
    assert len({setting.name for setting in (*SETTINGS, *EDITS)}) == len(SETTINGS) + len(EDITS)


def test_the_table_is_sorted_and_says_who_is_above_lora() -> None:
    shared = {"steps": 1, "batch_size": 1, "held_out": 1}
    rows = [row(BASELINE, [0.8, 0.8, 0.8]), row("better", [0.9, 0.9, 0.81]), row("mixed", [0.9, 0.7, 0.8])]
    rows.append(row("worse", [0.7, 0.7, 0.7]))
    text = quality_table(rows, {"accuracy": 0.75, "loss": 1.2345}, shared, [0, 1, 2])
    assert "Without an adapter the model's accuracy is 75.0% and its loss 1.234." in text
    lines = text.splitlines()[4:]
    assert [line.split("|")[1].strip() for line in lines] == ["better", BASELINE, "mixed", "worse"]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines}
    unclear = "no clear difference"
    against_base = {"better": "above", BASELINE: "above", "mixed": unclear, "worse": "below"}
    assert {name: row[3] for name, row in cells.items()} == against_base
    against_lora = {"better": "above", BASELINE: "", "mixed": unclear, "worse": "below"}
    assert {name: row[4] for name, row in cells.items()} == against_lora


def test_an_edit_that_is_no_better_than_the_base_is_named() -> None:
    base = {"accuracy": 0.8, "loss": 0.6}
    better, worse = row("better", [0.85]), row("worse", [0.8])
    assert no_better([better], base) == []
    assert no_better([better, worse], base) == ["worse: accuracy 80.0% and loss 0.500, the base's are 80.0% and 0.600"]
    (line,) = no_better([better], {**base, "loss": 0.4})
    assert line.startswith("better: accuracy 85.0% and loss 0.500")
    text = quality_table([better], base, {"steps": 1, "batch_size": 1, "held_out": 1}, [0])
    assert "one seed." in text
    assert "| better | 85.0% | above | 0.500 |" in text


@pytest.mark.parametrize(
    ("fast", "plain", "said"), [(0.5, 1.0, "reproduced"), (1.5, 1.0, "not reproduced"), (1.0, 1.0, "not reproduced")]
)
def test_a_start_is_faster_where_its_first_losses_are_lower(fast: float, plain: float, said: str) -> None:
    rows = [row(BASELINE, [0.8], losses=[plain] * 10), row("LoRA, PiSSA", [0.8], losses=[fast] * 10)]
    assert f"PiSSA starts faster than LoRA**: {said}." in claims(rows)


def test_ranks_are_uneven_where_they_differ_and_halves_are_compared() -> None:
    rows = [row(BASELINE, [0.8], half=0.6), row("AdaLoRA", [0.8], ranks=[0, 4, 8]), row("DyLoRA", [0.8], half=0.7)]
    text = claims(rows)
    assert "unevenly**: reproduced. Layers end with 0 to 8 triplets, 4.0 on average (1 of 3 with none)" in text
    assert "cut to half**: reproduced" in text
    even = [row("AdaLoRA", [0.8], ranks=[8, 8])]
    assert "unevenly**: not reproduced" in claims(even)
