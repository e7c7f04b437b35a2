"""What the serving benchmark makes of its rows: ratios, floors, tables. Nothing is timed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "serve.py"
SPEC = importlib.util.spec_from_file_location("bench_serve", PATH)
assert SPEC is not None
assert SPEC.loader is not None
serve = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(serve)


def rows(**changes: float) -> dict[str, Any]:
    found = {"ours": 700.0, "bare": 1000.0, "peft": 100.0, "later": 40.0, "zipf": 600.0, "memory": 0.5}
    found |= {"vllm": 900.0, "vllm_mixed": 200.0} | changes
    return {
        "lorakit": {
            "0 distinct": {"tokens_per_second": found["bare"]},
            "32 distinct": {"tokens_per_second": found["ours"]},
            "first token": {"later_ms": found["later"]},
            "zipf": {"tokens_per_second": found["zipf"]},
            "memory": {"gigabytes": found["memory"]},
        },
        "peft": {"32 distinct": {"tokens_per_second": found["peft"]}},
        "vllm": {
            "0 distinct": {"tokens_per_second": found["vllm"]},
            "32 distinct": {"tokens_per_second": found["vllm_mixed"]},
        },
    }


def missed(**changes: float) -> list[str]:
    return [floor["what"] for floor in serve.floors(rows(**changes)) if not floor["met"]]


def test_each_floor_can_be_missed() -> None:
    assert missed() == []
    assert missed(peft=120.0) == ["32 distinct adapters, against PEFT's mixed batch"]
    assert missed(bare=1300.0) == ["32 distinct against own base only"]
    assert missed(vllm=1001.0) == ["base only, against vLLM's CPU build"]
    assert missed(vllm_mixed=234.0) == ["32 distinct adapters, against vLLM's"]
    assert missed(later=61.0) == ["cold adapter: first token later than warm by"]
    assert missed(zipf=480.0) == ["1,000 known, 100 in memory, Zipf-1.5, against 32 resident"]
    assert missed(memory=0.71) == ["memory of 100 rank-8 adapters"]


def test_sides_that_were_not_run_have_no_floors() -> None:
    own = {"lorakit": {"0 distinct": {"tokens_per_second": 9.0}}}
    assert serve.floors(own) == []


def test_the_table_says_what_was_found() -> None:
    record = {
        "date": "2026-11-25 19:00",
        "cores": 2,
        "others": 0.1,
        "peak": 900.0,
        "peak_after": 800.0,
        "job": {"requests": 64, "prompt": 64, "new": 64},
        "versions": {"lorakit": "1", "peft": "2"},
        "rows": rows(peft=120.0),
        "floors": serve.floors(rows(peft=120.0)),
    }
    table = serve.markdown(record)
    assert "| lorakit 1 | 1000 | - | - | 700 |" in table
    assert "against PEFT's mixed batch | 5.83× | ≥ 6× | **missed** |" in table
    assert "| memory of 100 rank-8 adapters | 0.50 GB | ≤ 0.7 GB | met |" in table
    assert "900 GFLOP/s before and 800 after" in table
