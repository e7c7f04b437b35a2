"""What the rows of the quality benchmark say: the table, and three claims of papers held against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from quality.settings import BASELINE

Row = dict[str, Any]

EARLY = 8
"""Steps over which a start is compared: the mean training loss of the first so many."""


def values(row: Row, key: str) -> list[float]:
    """One figure of every seed."""
    return [float(run[key]) for run in row["runs"]]


def spread(numbers: Sequence[float], form: Callable[[float], str]) -> str:
    """The median with its range, or the one number that there is."""
    if len(numbers) == 1:
        return form(numbers[0])
    return f"{form(median(numbers))} ({form(min(numbers))} to {form(max(numbers))})"


def percent(number: float) -> str:
    return f"{number:.1%}"


def beats(row: Row, others: Sequence[float]) -> str:
    """Whether a row's accuracy is above the others', seed by seed: on all seeds, on none, or it depends on the seed."""
    pairs = list(zip(values(row, "accuracy"), others, strict=True))
    better = sum(ours > theirs for ours, theirs in pairs)
    worse = sum(ours < theirs for ours, theirs in pairs)
    if better == len(pairs):
        return "above"
    return "below" if worse == len(pairs) else "no clear difference"


def quality_table(rows: Sequence[Row], base: dict[str, Any], shared: dict[str, Any], seeds: Sequence[int]) -> str:
    """A line per method, the best median accuracy first; `base` is the model as it came."""
    baseline = next((row for row in rows if row["name"] == BASELINE), None)
    count, accuracy = shared["held_out"], base["accuracy"]
    several = len(seeds) > 1
    many = f"{len(seeds)} seeds (median, least and greatest)" if several else "one seed"
    heads = [
        "method",
        "accuracy",
        "against the base",
        *(["against LoRA"] if baseline is not None else []),
        "held-out loss",
    ]
    heads += ["trained numbers", "adapter file", "processor s", "peak memory", "learning rate", ""]
    lines = [
        f"SmolLM2-135M-Instruct, film reviews, {shared['steps']} steps of {shared['batch_size']} examples, {count} held-out "
        f"rows, {many}. Seconds are one thread's processor time for a whole run with its evaluation. Without an adapter the "
        f"model's accuracy is {percent(accuracy)} and its loss {base['loss']:.3f}. The standard error of one accuracy on so "
        f"many rows is {percent((accuracy * (1 - accuracy) / count) ** 0.5)}; all rows are measured on the same ones.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for row in sorted(rows, key=lambda row: (-median(values(row, "accuracy")), median(values(row, "loss")))):
        cells = [row["name"], spread(values(row, "accuracy"), percent), beats(row, [accuracy] * len(row["runs"]))]
        if baseline is not None:
            cells.append("" if row is baseline else beats(row, values(baseline, "accuracy")))
        cells += [
            spread(values(row, "loss"), "{:.3f}".format),
            f"{row['runs'][0]['trained']:,}",
            f"{median(values(row, 'file_bytes')) / 1e6:,.2f} MB",
            f"{median(values(row, 'processor_seconds')):.0f}",
            f"{median(values(row, 'memory_peak')) / 1e9:.2f} GB",
            f"{row['learning_rate']:g}",
            row["note"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def no_better(rows: Sequence[Row], base: dict[str, Any]) -> list[str]:
    """The rows that are not above the base in accuracy and below it in loss, in words."""
    found = []
    for row in rows:
        accuracy, loss = median(values(row, "accuracy")), median(values(row, "loss"))
        if accuracy <= base["accuracy"] or loss >= base["loss"]:
            found.append(
                f"{row['name']}: accuracy {percent(accuracy)} and loss {loss:.3f}, the base's are "
                f"{percent(base['accuracy'])} and {base['loss']:.3f}"
            )
    return found


def claims(rows: Sequence[Row]) -> str:
    """What three papers say of their methods, and what these rows say."""
    named = {row["name"]: row for row in rows}
    lines = []
    if BASELINE in named:
        plain = early(named[BASELINE])
        for name in ("LoRA, PiSSA", "LoRA, LoRA-GA"):
            if name in named:
                lines.append(
                    f"- **{name.split(', ')[1]} starts faster than LoRA**: {starts(early(named[name]), plain)}"
                )
    if "AdaLoRA" in named:
        lines.append(f"- **AdaLoRA spends its ranks unevenly**: {uneven(named['AdaLoRA'])}")
    if "DyLoRA" in named and BASELINE in named:
        lines.append(f"- **DyLoRA at half rank beats LoRA cut to half**: {halves(named['DyLoRA'], named[BASELINE])}")
    return "\n".join(lines)


def early(row: Row) -> list[float]:
    """The mean training loss of the first steps, for every seed."""
    return [mean(run["losses"][:EARLY]) for run in row["runs"]]


def verdict(better: int, count: int) -> str:
    return "reproduced" if better == count else "not reproduced" if better == 0 else f"on {better} of {count} seeds"


def starts(ours: Sequence[float], plain: Sequence[float]) -> str:
    better = sum(a < b for a, b in zip(ours, plain, strict=True))
    return (
        f"{verdict(better, len(ours))}. Mean training loss of the first {EARLY} steps "
        f"{spread(ours, '{:.3f}'.format)}, LoRA's {spread(plain, '{:.3f}'.format)}."
    )


def uneven(row: Row) -> str:
    found = [run["ranks"] for run in row["runs"]]
    differing = sum(len(set(ranks)) > 1 for ranks in found)
    first = found[0]
    none = sum(rank == 0 for rank in first)
    return (
        f"{verdict(differing, len(found))}. Layers end with {min(first)} to {max(first)} triplets, {mean(first):.1f} on "
        f"average ({none} of {len(first)} with none)."
    )


def halves(ours: Row, plain: Row) -> str:
    own, cut = values(ours, "half"), values(plain, "half")
    better = sum(a > b for a, b in zip(own, cut, strict=True))
    return (
        f"{verdict(better, len(own))}. Accuracy at half rank {spread(own, percent)} (at full rank "
        f"{spread(values(ours, 'accuracy'), percent)}), LoRA cut to half {spread(cut, percent)}."
    )
