"""The command of the training benchmark: who comes first, one at a time, and results that survive an interruption."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import train
from benchmarks.test_floors import row


def test_every_side_comes_first_in_its_turn() -> None:
    sides = ["lorakit", "trl", "loop"]
    assert [train.turned(sides, number)[0] for number in range(4)] == ["lorakit", "trl", "loop", "lorakit"]
    assert sorted(train.turned(sides, 2)) == sorted(sides)


def test_a_second_benchmark_is_refused(tmp_path: Path) -> None:
    with train.alone(tmp_path), pytest.raises(SystemExit, match="another one is running"), train.alone(tmp_path):
        pass
    with train.alone(tmp_path):  # the first is over
        pass


def test_what_is_measured_so_far_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(output=tmp_path / "deep" / "train.json", patience=0.0)
    run = train.Run(options, tmp_path)
    measured: dict[str, Any] = {"workload": "a", "side": "lorakit", "round": 0, "gemm_peak": 2e12}
    monkeypatch.setattr(run, "do", lambda name, job: row("a", "lorakit", 0, [2.0, 1.0]) | measured)
    run.measure("a", "lorakit", -1, {}, cold=True, seed=0)
    run.rows[-1]["round"] = -1
    run.measure("a", "lorakit", 0, {}, seed=0)
    record = json.loads(options.output.read_text())
    assert [one["round"] for one in record["rows"]] == [-1, 0]
    assert not record["finished"]
    assert "interrupted" in record["markdown"]
    assert "lorakit's first step with nothing compiled yet: 2.0 s" in record["markdown"]
    assert record["gemm_peak"] == 2e12
    assert {floor["verdict"] for floor in record["floors"]} == {"not measured"}


def test_every_side_of_the_plan_is_known() -> None:
    for plan in train.PLAN.values():
        assert set(plan.steps) <= set(plan.full) <= set(train.DOERS) == set(train.SIDES)
    assert set(train.PLAN) == set(train.WORKLOADS)
    assert set(train.FEWER) <= set(train.SIDES)
