"""What the benchmark of experts makes of its rows. Nothing is timed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "expert_training.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmark's module, whose name is also that of a room of tests."""
    spec = importlib.util.spec_from_file_location("expert_training", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(ours: float, theirs: float, grew: float, loss: float = 7.0) -> list[dict[str, Any]]:
    return [
        {
            "model": "qwen3-moe", "dtype": "float32", "side": side, "round": number, "seconds": [9.0, seconds, seconds],
            "losses": [loss if side == "peft" else 7.0], "grew": memory, "peak": 4e11, "others_share": 0.0,
        }
        for number in range(2)
        for side, seconds, memory in (("lorakit", ours, grew), ("peft", theirs, 1e9))
    ]  # fmt: skip


def test_floors_are_judged_by_round(bench: Any) -> None:
    lines, missed = bench.judged(rows(1.0, 4.0, 3e8))
    assert not missed
    assert "4.00× (4.00× to 4.00×)" in lines[0]
    assert "0.30× (0.30× to 0.30×)" in lines[0]
    assert "2.90 times as fast, the floor is 3.0" in bench.judged(rows(1.0, 2.9, 3e8))[1][0]
    assert "0.60 of the memory, the floor is 0.5" in bench.judged(rows(1.0, 4.0, 6e8))[1][0]


def test_unequal_work_is_seen(bench: Any) -> None:
    assert "do not start from the same loss" in bench.judged(rows(1.0, 4.0, 3e8, loss=7.2))[1][0]
