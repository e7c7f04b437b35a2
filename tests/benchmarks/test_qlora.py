"""The QLoRA benchmark fails where the accuracy is not kept, or the float copy is another model."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

import qlora
from lorakit.train import load_config

Runs = dict[str, list[dict[str, Any]]]


def sides(nf4: float, copy: float) -> Runs:
    """Two seeds a way, a point above and below the mean, of a hundred rows; NF4's wrong ones are others."""
    runs: Runs = {"none": [], "nf4": []}
    for step in (-0.01, 0.01):
        for way, middle in (("none", 0.85), ("nf4", nf4)):
            right = [place < round(100 * (middle + step)) for place in range(100)]
            run = {"accuracy": middle + step, "loss": 0.5, "steps": 40, "base_bytes": 1e8}
            run["right"] = right if way == "none" else right[::-1]
            runs[way].append(run | ({"copy_accuracy": copy + step, "copy_loss": 0.5} if way == "nf4" else {}))
    return runs


def test_what_is_kept_is_not_missed() -> None:
    assert qlora.missed(sides(0.84, 0.836)) == []
    assert qlora.missed(sides(0.88, 0.88)) == []


@pytest.mark.parametrize(
    ("nf4", "copy", "said"), [(0.83, 0.83, "NF4 is 2.0 points below"), (0.85, 0.80, "5.0 points off")]
)
def test_what_is_lost_is_said(nf4: float, copy: float, said: str) -> None:
    (line,) = qlora.missed(sides(nf4, copy))
    assert said in line


def test_the_error_of_a_difference_is_that_of_rows_that_differ() -> None:
    same = sides(0.85, 0.85)["none"]
    assert qlora.paired_error(same, same) == 0.0
    runs = sides(0.85, 0.85)
    # 15 of 100 rows on each side, twice, are right on one side alone: their variance is 0.3
    assert qlora.paired_error(runs["nf4"], runs["none"]) == pytest.approx((0.3 / 200) ** 0.5, rel=0.02)


def test_the_table_has_means_ranges_and_the_difference() -> None:
    runs = sides(0.84, 0.84)
    for run in (*runs["none"], *runs["nf4"]):
        run.update(seconds=[9.0, 1.0, 2.0, 1.5], held=1e8, in_training=2e8)
    text = qlora.table(runs, Namespace(rows=640, held_out=100))
    assert "| LoRA on bfloat16 | 85.0% (84.0% to 86.0%) | 0.5000 (0.5000 to 0.5000) | 1.50 (1.00 to 2.00) |" in text
    assert "2 seeds, mean with least and greatest" in text
    assert "NF4 differs from bfloat16 by -1.0 points, with a standard error of" in text
    one = qlora.table({way: found[:1] for way, found in runs.items()}, Namespace(rows=640, held_out=100))
    assert "| LoRA on bfloat16 | 84.0% | 0.5000 | 1.50 (1.00 to 2.00) | 100.0 MB | 100 MB | 200 MB |" in one
    assert "one seed." in one


def test_both_ways_are_runs_that_are_accepted() -> None:
    job = {"way": "none", "seed": 1, "rows": 10, "held_out": 5}
    config = load_config(qlora.ROOT / "examples" / "qlora.yaml", qlora.flags_of(job, "folder"))
    assert config.quantize is None
    assert (config.train.seed, config.data.shuffle_seed, config.data.limit) == (1, 1, 10)
