"""What the training benchmark makes of its rows: ratios, floors, equal work, tables. Nothing is timed here."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.floors import (
    FLOORS,
    Row,
    Spread,
    Verdict,
    floor_table,
    judge,
    memory_shares,
    speed_ups,
    unequal_work,
    workload_table,
)
from trainers.picture import draw_bars


def row(workload: str, side: str, number: int, seconds: list[float], **changed: Any) -> Row:
    """A row as a process writes it."""
    steps = len(seconds)
    return {
        "workload": workload,
        "side": side,
        "round": number,
        "seed": number,
        "seconds": seconds,
        "tokens": [100] * steps,
        "flops": [2e9] * steps,
        "digests": [f"batch {number}.{step}" for step in range(steps)],
        "losses": [0.5] * steps,
        "memory_before": 5e8,
        "memory_peak": 1e9,
        "start_norm": 33.0,
    } | changed


def rounds(side: str, seconds: list[list[float]], workload: str = "a", **changed: Any) -> list[Row]:
    """One row per round."""
    return [row(workload, side, number, own, **changed) for number, own in enumerate(seconds)]


def test_a_ratio_is_of_common_steps_without_the_first() -> None:
    rows = rounds("lorakit", [[9, 1, 1, 50], [9, 2, 2, 50], [9, 1, 1, 50]])
    rows += rounds("trl", [[1, 6, 6], [1, 6, 6], [1, 8, 8]])
    found = speed_ups(rows, "a", "trl")
    assert found == Spread(6, 3, 8, 3)


def test_rounds_are_compared_with_their_own() -> None:
    rows = [row("a", "lorakit", 1, [9, 1]), row("a", "trl", 0, [9, 4])]
    assert speed_ups(rows, "a", "trl") is None
    assert speed_ups([*rows, row("a", "trl", 1, [9, 5])], "a", "trl") == Spread(5, 5, 5, 1)


def test_memory_is_a_share_of_the_others_peak() -> None:
    rows = [row("a", "lorakit", 0, [1, 1], memory_peak=1e9), row("a", "trl", 0, [1, 1], memory_peak=4e9)]
    assert memory_shares(rows, "a") == Spread(0.25, 0.25, 0.25, 1)


def verdict(name: str, rows: list[Row]) -> Verdict:
    """The one verdict whose floor begins so."""
    (found,) = [one for one in judge(rows) if one.floor.name.startswith(name)]
    return found


@pytest.mark.parametrize(
    ("theirs", "word"), [(5.9, "**missed**"), (6.0, "met"), (11.9, "met"), (12.0, "aim reached"), (40.0, "aim reached")]
)
def test_a_floor_is_missed_met_or_passed(theirs: float, word: str) -> None:
    rows = [row("a", "lorakit", 0, [1, 1]), row("a", "trl", 0, [1, theirs])]
    found = verdict("(a) against TRL", rows)
    assert found.word == word
    assert found.missed == (word == "**missed**")


@pytest.mark.parametrize(
    ("peak", "word"), [(0.41e9, "**missed**"), (0.4e9, "met"), (0.26e9, "met"), (0.25e9, "aim reached")]
)
def test_a_ceiling_is_kept_from_below(peak: float, word: str) -> None:
    rows = [row("c", "lorakit", 0, [1, 1], memory_peak=peak), row("c", "trl", 0, [1, 1], memory_peak=1e9)]
    assert verdict("peak memory, (c)", rows).word == word


def test_what_was_not_measured_is_not_missed() -> None:
    verdicts = judge([])
    assert len(verdicts) == len(FLOORS)
    assert {one.word for one in verdicts} == {"not measured"}
    assert not any(one.missed for one in verdicts)


def test_losses_are_compared_over_seeds() -> None:
    ours, theirs = [0.50, 0.52, 0.48], [0.51, 0.50, 0.49]
    rows = [row("a", "lorakit", n, [1, 1], losses=[loss] * 2) for n, loss in enumerate(ours)]
    rows += [row("a", "trl", n, [1, 1], losses=[loss] * 2) for n, loss in enumerate(theirs)]
    found = verdict("(a) mean training loss", rows)
    assert found.word == "met"
    assert found.found is not None
    assert found.found.median == pytest.approx(0, abs=1e-9)
    assert found.found.greatest == pytest.approx(4)
    rows[0]["losses"] = [0.60, 0.60]
    assert verdict("(a) mean training loss", rows).missed


def test_runs_of_other_lengths_have_no_common_loss() -> None:
    rows = [row("a", "lorakit", 0, [1, 1, 1]), row("a", "trl", 0, [1, 1], losses=[9, 9])]
    assert verdict("(a) mean training loss", rows).found is None


@pytest.mark.parametrize(("accuracy", "missed"), [(0.85, False), (0.864, False), (0.87, True), (0.83, True)])
def test_accuracy_may_differ_by_one_and_a_half_points(accuracy: float, missed: bool) -> None:
    rows = [row("a", "lorakit", 0, [1, 1], accuracy=accuracy), row("a", "trl", 0, [1, 1], accuracy=0.85)]
    assert verdict("(a) held-out accuracy", rows).missed == missed


def test_dora_and_attaching_have_ceilings() -> None:
    rows = [row("a", "lorakit", 0, [1, 1.0]), row("a", "dora", 0, [1, 1.2])]
    assert verdict("DoRA", rows).word == "met"
    rows.append({"workload": "attach", "side": "attach", "round": 0, "attach": [0.06, 0.07], "switch": [4e-5]})
    assert verdict("attach", rows).missed
    assert verdict("switch", rows).word == "aim reached"


def test_unequal_work_is_told() -> None:
    rows = [row("a", "lorakit", 0, [1, 1]), row("a", "trl", 0, [1, 1, 1]), row("a", "dora", 0, [1, 1], start_norm=40.0)]
    assert unequal_work(rows) == []
    rows[1]["digests"] = ["batch 0.0", "another", "batch 0.2"]
    assert "trl was fed other batches" in unequal_work(rows)[0]
    rows[1] = row("a", "trl", 0, [1, 1], start_norm=33.1)
    assert "trl started from other weights" in unequal_work(rows)[0]


def test_tables_show_medians_and_ranges() -> None:
    rows = rounds("lorakit", [[9, 0.5], [9, 0.4], [9, 0.8]]) + rounds("trl", [[9, 4.0], [9, 4.0], [9, 4.0]])
    rows[0]["accuracy"] = 0.85
    table = workload_table(rows, "a", gemm_peak=1e12)
    ours = next(line for line in table.splitlines() if line.startswith("| lorakit |"))
    assert "0.500 (0.400 to 0.800)" in ours
    assert "200 (125 to 250)" in ours
    assert "85.0%" in ours
    assert ours.count("|") == table.splitlines()[0].count("|")
    floors = floor_table(judge(rows))
    assert "| (a) against TRL + PEFT, bf16 | 6× | 12× | 8.00× (5.00× to 10.00×) | met |" in floors
    assert "| switch adapters | at most 1 ms | 0.05 ms |  | not measured |" in floors


def test_the_picture_is_drawn_of_whatever_is_there() -> None:
    rows = rounds("lorakit", [[9, 0.5], [9, 0.4]]) + rounds("trl", [[9, 4.0]]) + rounds("lorakit", [[1, 1]], "c")
    for part in ([], rows):
        assert draw_bars(part).startswith(b"\x89PNG")
