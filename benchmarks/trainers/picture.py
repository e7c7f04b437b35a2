"""The picture of the training benchmark: tokens a second and peak memory of every side, medians with their ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from trainers.floors import SIDES, WORKLOADS, Row, Spread, rows_of, steady

OURS, THEIRS = "#1f6fb2", "#b9bec5"


def draw_bars(rows: Sequence[Row]) -> bytes:
    """PNG bytes: a line of panels for each workload."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    measured = [name for name in WORKLOADS if any(row["workload"] == name for row in rows)]
    sides = {name: [side for side in SIDES if rows_of(rows, name, side)] for name in measured}
    heights = [len(found) + 0.6 for found in sides.values()]
    figure = Figure(figsize=(10.5, 0.9 + 0.42 * sum(heights)), dpi=130, layout="constrained")
    axes: Any = figure.subplots(len(measured), 2, squeeze=False, height_ratios=heights) if measured else []
    for (speed, memory), name in zip(axes, measured, strict=True):
        draw_panel(speed, rows, name, sides[name], tokens_per_second, "{:,.0f}")
        draw_panel(memory, rows, name, sides[name], lambda row: row["memory_peak"] / 1e9, "{:.2f}")
        memory.set_yticklabels([])
        speed.set_title(f"({name}) {WORKLOADS[name]}", loc="left", fontsize=9)
    if measured:
        axes[-1][0].set_xlabel("real tokens a second (more is better)")
        axes[-1][1].set_xlabel("peak memory of the process, GB (less is better)")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def tokens_per_second(row: Row) -> float:
    """Real tokens of the steps after the first over their seconds."""
    seconds = sum(steady(row)) or sum(row["seconds"])
    return float(sum(row["tokens"][-len(steady(row)) :]) / seconds)


def draw_panel(
    axis: Any, rows: Sequence[Row], workload: str, sides: Sequence[str], figure: Callable[[Row], float], form: str
) -> None:
    """One bar per side, its median written beside it, its range as a whisker."""
    spreads = [Spread.of(map(figure, rows_of(rows, workload, side).values())) for side in sides]
    greatest = max(spread.greatest for spread in spreads if spread)
    for place, (side, spread) in enumerate(zip(sides, spreads, strict=True)):
        if spread is None:
            continue
        reach = [[spread.median - spread.least], [spread.greatest - spread.median]]
        colour = OURS if side in ("lorakit", "dora") else THEIRS
        axis.barh(place, spread.median, height=0.62, color=colour, xerr=reach, ecolor="#444444", capsize=2.5)
        axis.text(spread.greatest + 0.015 * greatest, place, form.format(spread.median), va="center", fontsize=8)
    axis.set_yticks(range(len(sides)), [SIDES[side] for side in sides], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * greatest)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
