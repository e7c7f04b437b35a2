"""What the raw rows of the training benchmark say: speed against each other side, memory, equal work, floors met.

A row is what one process measured: `workload`, `side`, `round`, `seed`, `seconds` and `tokens` of each step, `digests`
of the batches it was fed, `losses`, `memory_peak`. Nothing here measures or reads a file.

Speeds are compared on the steps that both sides took, without the first, in which lorakit compiles and every side
touches its memory for the first time; what the first step took stands in a column of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

SIDES = {
    "lorakit": "lorakit",
    "dora": "lorakit, DoRA",
    "trl": "TRL + PEFT, bf16",
    "trl-defaults": "TRL + PEFT, its defaults (fp32, dropout 0.05)",
    "loop": "PEFT in a loop by hand, bf16",
    "trainer": "Trainer + PEFT, bf16",
}

WORKLOADS = {
    "a": "film reviews behind a shared prompt, batch 16",
    "b": "the same reviews, the question after the text, batch 16",
    "c": "newspaper text, rows of 1,024 to 2,048 tokens, batch 2",
    "d": "MiniLM as a classifier of tweets, batch 32",
}


@dataclass(frozen=True)
class Spread:
    """The median of a few measurements, and the least and greatest of them."""

    median: float
    least: float
    greatest: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        known = sorted(values)
        return cls(statistics.median(known), known[0], known[-1], len(known)) if known else None


@dataclass(frozen=True)
class Floor:
    """One promise: `measure(rows)` gives its figure, which must be at least `floor`, or at most if `at_most`."""

    name: str
    measure: Callable[[Sequence[Row]], Spread | None]
    floor: float
    aim: float | None
    unit: str = "×"
    at_most: bool = False

    def met(self, found: Spread, bound: float | None = None) -> bool:
        """Whether the median keeps the floor (or another bound, such as the aim)."""
        bound = self.floor if bound is None else bound
        return found.median <= bound if self.at_most else found.median >= bound


@dataclass(frozen=True)
class Verdict:
    """A floor and what was found; `found` is None where it was not measured."""

    floor: Floor
    found: Spread | None

    @property
    def missed(self) -> bool:
        """Measured, and not kept."""
        return self.found is not None and not self.floor.met(self.found)

    @property
    def word(self) -> str:
        """The verdict as it stands in the table."""
        if self.found is None:
            return "not measured"
        if self.missed:
            return "**missed**"
        reached = self.floor.aim is not None and self.floor.met(self.found, self.floor.aim)
        return "aim reached" if reached else "met"


# -- figures ---------------------------------------------------------------------------------------


def rows_of(rows: Iterable[Row], workload: str, side: str) -> dict[int, Row]:
    """The measured rows of one side of a workload by their round."""
    return {row["round"]: row for row in rows if row["workload"] == workload and row["side"] == side}


def steady(row: Row, steps: int | None = None) -> list[float]:
    """The seconds of the steps after the first, the first `steps` of the run at most."""
    seconds: list[float] = row["seconds"][1:steps]
    return seconds


def speed_ups(rows: Sequence[Row], workload: str, side: str, against: str = "lorakit") -> Spread | None:
    """How many times as long `side` took as `against` for the same steps, round by round."""
    ours, theirs = rows_of(rows, workload, against), rows_of(rows, workload, side)
    ratios = []
    for number in sorted(ours.keys() & theirs.keys()):
        steps = min(len(ours[number]["seconds"]), len(theirs[number]["seconds"]))
        if steps > 1:
            ratios.append(sum(steady(theirs[number], steps)) / sum(steady(ours[number], steps)))
    return Spread.of(ratios)


def memory_shares(rows: Sequence[Row], workload: str, side: str = "trl") -> Spread | None:
    """The peak memory of lorakit's process over that of another side's, round by round."""
    ours, theirs = rows_of(rows, workload, "lorakit"), rows_of(rows, workload, side)
    shared = sorted(ours.keys() & theirs.keys())
    return Spread.of(ours[number]["memory_peak"] / theirs[number]["memory_peak"] for number in shared)


def mean_loss(row: Row) -> float:
    """The mean training loss over the steps of a run."""
    return statistics.fmean(row["losses"])


def whole_pairs(rows: Sequence[Row], workload: str, side: str = "trl") -> list[tuple[Row, Row]]:
    """Runs of lorakit and of another side with the same seed and the same number of steps."""
    ours, theirs = rows_of(rows, workload, "lorakit"), rows_of(rows, workload, side)
    pairs = [(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
    return [(one, other) for one, other in pairs if len(one["seconds"]) == len(other["seconds"])]


def loss_difference(rows: Sequence[Row]) -> Spread | None:
    """By how many percent the mean training loss, over all seeds, differs from TRL's; the range is that of seeds."""
    pairs = whole_pairs(rows, "a")
    if not pairs:
        return None
    each = [abs(mean_loss(one) / mean_loss(other) - 1) * 100 for one, other in pairs]
    ours, theirs = (statistics.fmean(map(mean_loss, side)) for side in zip(*pairs, strict=True))
    return Spread(abs(ours / theirs - 1) * 100, min(each), max(each), len(each))


def accuracy_difference(rows: Sequence[Row]) -> Spread | None:
    """By how many points the held-out accuracy, over all seeds, differs from TRL's; the range is that of seeds."""
    pairs = [(one, other) for one, other in whole_pairs(rows, "a") if "accuracy" in one and "accuracy" in other]
    if not pairs:
        return None
    each = [abs(one["accuracy"] - other["accuracy"]) * 100 for one, other in pairs]
    ours, theirs = (statistics.fmean(row["accuracy"] for row in side) for side in zip(*pairs, strict=True))
    return Spread(abs(ours - theirs) * 100, min(each), max(each), len(each))


def timed(rows: Sequence[Row], what: str) -> Spread | None:
    """Milliseconds of attaching or switching: the median and range over all of its repetitions."""
    times = [seconds * 1e3 for row in rows if row["side"] == "attach" for seconds in row[what]]
    return Spread.of(times)


FLOORS = (
    Floor("(a) against TRL + PEFT, bf16", lambda rows: speed_ups(rows, "a", "trl"), 6, 12),
    Floor("(b) against TRL + PEFT, bf16", lambda rows: speed_ups(rows, "b", "trl"), 4, 7),
    Floor("(c) against TRL + PEFT, bf16", lambda rows: speed_ups(rows, "c", "trl"), 2, 3),
    Floor("(d) against Trainer + PEFT, bf16", lambda rows: speed_ups(rows, "d", "trainer"), 1.5, 3),
    Floor("(a) against the loop by hand", lambda rows: speed_ups(rows, "a", "loop"), 2.5, 5),
    Floor("peak memory, (a), of TRL + PEFT's", lambda rows: memory_shares(rows, "a"), 0.4, 0.25, at_most=True),
    Floor("peak memory, (c), of TRL + PEFT's", lambda rows: memory_shares(rows, "c"), 0.4, 0.25, at_most=True),
    Floor("DoRA's step, of LoRA's", lambda rows: speed_ups(rows, "a", "dora"), 1.3, 1.1, at_most=True),
    Floor("attach to 210 layers", lambda rows: timed(rows, "attach"), 50, 10, " ms", at_most=True),
    Floor("switch adapters", lambda rows: timed(rows, "switch"), 1, 0.05, " ms", at_most=True),
    Floor("(a) mean training loss, off TRL's", loss_difference, 2, None, "%", at_most=True),
    Floor("(a) held-out accuracy, off TRL's", accuracy_difference, 1.5, None, " points", at_most=True),
)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every floor against what the rows say."""
    return [Verdict(floor, floor.measure(rows)) for floor in FLOORS]


def unequal_work(rows: Sequence[Row]) -> list[str]:
    """What was not the same on all sides of a round: batches, or the weights that training started from."""
    complaints = []
    for workload in WORKLOADS:
        for number, ours in rows_of(rows, workload, "lorakit").items():
            for side in SIDES:
                theirs = rows_of(rows, workload, side).get(number)
                if theirs is None or side == "lorakit":
                    continue
                steps = min(len(ours["digests"]), len(theirs["digests"]))
                if not steps or ours["digests"][:steps] != theirs["digests"][:steps]:
                    complaints.append(f"({workload}) round {number + 1}: {side} was fed other batches than lorakit")
                if side != "dora" and abs(ours["start_norm"] / theirs["start_norm"] - 1) > 1e-6:
                    complaints.append(f"({workload}) round {number + 1}: {side} started from other weights")
    return complaints


# -- tables ----------------------------------------------------------------------------------------


def write(spread: Spread | None, form: str = "{:,.2f}", factor: float = 1.0) -> str:
    """A median with its range: 1.52 (1.48 to 1.60)."""
    if spread is None:
        return ""
    middle, least, greatest = (form.format(value * factor) for value in (spread.median, spread.least, spread.greatest))
    return middle if least == greatest else f"{middle} ({least} to {greatest})"


def workload_table(rows: Sequence[Row], workload: str, gemm_peak: float) -> str:
    """All sides of a workload, a line each."""
    lines = [
        "| | steps | s a step | real tokens a second | first step, s | peak memory, MB | of it in training, MB "
        "| share of the GEMM peak | mean loss | held-out accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for side, title in SIDES.items():
        runs = [row for row in rows_of(rows, workload, side).values() if len(row["seconds"]) > 1]
        if not runs:
            continue
        per_step = Spread.of(statistics.fmean(steady(row)) for row in runs)
        speed = Spread.of(sum(row["tokens"][1:]) / sum(steady(row)) for row in runs)
        share = Spread.of(sum(row["flops"][1:]) / sum(steady(row)) / gemm_peak for row in runs if row.get("flops"))
        cells = (
            title,
            f"{len(runs[0]['seconds'])}",
            write(per_step, "{:.3f}"),
            write(speed, "{:,.0f}"),
            write(Spread.of(row["seconds"][0] for row in runs), "{:.1f}"),
            write(Spread.of(row["memory_peak"] for row in runs), "{:,.0f}", 1e-6),
            write(Spread.of(row["memory_peak"] - row["memory_before"] for row in runs), "{:,.0f}", 1e-6),
            write(share, "{:.0%}"),
            write(Spread.of(mean_loss(row) for row in runs), "{:.4f}"),
            write(Spread.of(row["accuracy"] for row in runs if "accuracy" in row), "{:.1%}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def floor_table(verdicts: Sequence[Verdict]) -> str:
    """Every floor, its aim, and what was measured."""
    lines = ["| | floor | aim | measured | |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        floor = verdict.floor
        sign = "at most " if floor.at_most else ""
        digits = "{:.3f}" if floor.unit == " ms" else "{:.2f}"
        aim = "" if floor.aim is None else f"{floor.aim:g}{floor.unit}"
        found = write(verdict.found, digits + floor.unit)
        lines.append(f"| {floor.name} | {sign}{floor.floor:g}{floor.unit} | {aim} | {found} | {verdict.word} |")
    return "\n".join(lines)
