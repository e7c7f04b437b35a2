"""Pictures of the quality benchmark: accuracy against trained numbers, and how fast the starts begin."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from statistics import median
from typing import Any

from quality.settings import BASELINE
from quality.tables import Row, values

OURS, OTHERS = "#1f6fb2", "#8a929c"
STARTS = {BASELINE: OTHERS, "LoRA, PiSSA": "#1f6fb2", "LoRA, LoRA-GA": "#c4572a", "LoRA, OLoRA": "#4c9a4c"}


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_quality(rows: Sequence[Row], base: dict[str, Any]) -> bytes:
    """PNG bytes: a line per method with its median and range of accuracy, and how many numbers it trains; LoRA's median and the
    accuracy without an adapter (`base`) stand across."""
    from matplotlib.ticker import MultipleLocator

    ordered = sorted(rows, key=lambda row: median(values(row, "accuracy")))
    figure = _figure(9.5, 1.2 + 0.27 * len(ordered))
    accuracy, size = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    for place, row in enumerate(ordered):
        found = values(row, "accuracy")
        colour = "#c4572a" if row["name"] == BASELINE else OURS
        accuracy.plot([min(found), max(found)], [place, place], color=colour, linewidth=2, alpha=0.5)
        accuracy.plot(median(found), place, "o", color=colour, markersize=5)
        size.barh(place, row["runs"][0]["trained"], color=colour, height=0.6, alpha=0.7)
    baseline = next((row for row in rows if row["name"] == BASELINE), None)
    if baseline is not None:
        accuracy.axvline(median(values(baseline, "accuracy")), color="#c4572a", linewidth=0.8, linestyle=":")
    accuracy.axvline(base["accuracy"], color=OTHERS, linewidth=0.8, linestyle="--")
    accuracy.annotate(
        "no adapter", (base["accuracy"], len(ordered) - 0.3), fontsize=7, color=OTHERS, ha="center", backgroundcolor="w"
    )
    accuracy.set_ylim(-0.7, len(ordered) + 0.2)
    accuracy.set_yticks(range(len(ordered)), [row["name"] for row in ordered], fontsize=8)
    accuracy.xaxis.set_major_locator(MultipleLocator(0.05))
    accuracy.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    accuracy.set_xlabel("held-out accuracy, median and range over seeds")
    size.set_xscale("log")
    size.set_xlabel("trained numbers (log)")
    for axis in (accuracy, size):
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_starts(rows: Sequence[Row]) -> bytes:
    """PNG bytes: the training loss of the first steps for the ways in which LoRA can start, mean over seeds."""
    figure = _figure(7, 3.6)
    axis = figure.subplots()
    for row in rows:
        if row["name"] in STARTS:
            curves = [run["losses"] for run in row["runs"]]
            means = [sum(step) / len(step) for step in zip(*curves, strict=True)]
            name = "LoRA" if row["name"] == BASELINE else row["name"].removeprefix("LoRA, ")
            axis.plot(range(1, len(means) + 1), means, label=name, color=STARTS[row["name"]], linewidth=1.6)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss, mean over seeds")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)
