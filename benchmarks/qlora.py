"""QLoRA beside LoRA on film reviews: accuracy, seconds a step and memory, each run in a process of its own; and its float copy.

    make bench-qlora             the table, benchmarks/results/qlora.json; fails where NF4 is further below bfloat16 than
                                 1.5 points of held-out accuracy, or its merged float copy is not what was trained
    BENCH_OPTIONS="--rows 2000 --seeds 3"    the whole of examples/qlora.yaml, three times

Every run is examples/qlora.yaml, once as it is and once with --quantize none: the same rows in the same order, the same seed.
What was measured with the same options stays in .cache/bench-qlora and is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import material
from trainers.machine import describe, memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "qlora.json"
WAYS = {"none": "LoRA on bfloat16", "nf4": "LoRA on NF4 (QLoRA)"}
BELOW = 0.015
"""How far NF4's accuracy, the mean over seeds, may be below bfloat16's."""
COPY = 0.01
"""How far the float copy's accuracy, the mean over seeds, may be from the adapter's on its quantised base."""


# -- one run, in its own process ---------------------------------------------------------------------------------------


def flags_of(job: dict[str, Any], folder: str) -> list[str]:
    """What `lorakit train` is told besides the recipe."""
    flags = ["--quantize", job["way"], "--train.output", folder, "--evaluate.before-and-after", "false"]
    flags += ["--train.seed", str(job["seed"]), "--data.shuffle-seed", str(job["seed"])]
    return [*flags, "--data.limit", str(job["rows"]), "--data.evaluation-limit", str(job["held_out"])]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train by the clock and evaluate; where the base was quantised, merge into floats and evaluate once more."""
    from lorakit.algebra.merging import merge
    from lorakit.train.config.run import load_config
    from lorakit.train.data.reading import load_splits
    from lorakit.train.run import evaluation_set, examine, path_for, train
    from trainers.sides import with_clock

    clock, before = with_clock(), memory()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(ROOT / "examples" / "qlora.yaml", flags_of(job, folder))
        result = train(config)
    assert result.after is not None
    noted = clock.result()
    found = {
        "accuracy": result.after.accuracy,
        "loss": result.after.loss,
        "right": [answer.right for answer in result.after.answers],
        "steps": result.record.steps,
        "seconds": noted["seconds"],
        "base_bytes": result.record.base_bytes,
        "held": noted["memory_before"] - before,
        "in_training": noted["memory_peak"] - noted["memory_before"],
    }
    if job["way"] != "none":
        merge(result.model, result.adapter.name, dtype=torch.bfloat16)
        held_rows = load_splits(config.data)[1]
        assert held_rows is not None
        held = evaluation_set(held_rows, result.tokenizer, config)
        copy = examine(result.model, result.tokenizer, held, config, path_for(config, result.model))
        found |= {"copy_accuracy": copy.accuracy, "copy_loss": copy.loss}
    return found


def apart(job: dict[str, Any], again: bool) -> dict[str, Any]:
    """A job in a process of its own, or from the cache."""
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    kept = material.cache_root() / "bench-qlora" / f"{digest}.json"
    if again or not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job), str(kept)], check=True, cwd=ROOT
        )
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


# -- what the runs say -------------------------------------------------------------------------------------------------


def values(runs: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(run[key]) for run in runs]


def paired_error(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    """The standard error of the mean difference of accuracy on the same held-out rows."""
    differences = [
        float(a) - float(b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one["right"], other["right"], strict=True)
    ]
    middle = mean(differences)
    variance = sum((one - middle) ** 2 for one in differences) / max(len(differences) - 1, 1)
    return float((variance / len(differences)) ** 0.5)


def missed(sides: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What the figures do not reach, in words."""
    found = []
    ours, theirs = mean(values(sides["nf4"], "accuracy")), mean(values(sides["none"], "accuracy"))
    if theirs - ours > BELOW:
        found.append(
            f"NF4 is {100 * (theirs - ours):.1f} points below bfloat16, with a standard error of "
            f"{100 * paired_error(sides['nf4'], sides['none']):.1f}; at most {100 * BELOW:.1f} are allowed"
        )
    off = abs(mean(values(sides["nf4"], "copy_accuracy")) - ours)
    if off > COPY:
        found.append(
            f"the float copy is {100 * off:.1f} points off what was trained; at most {100 * COPY:.1f} are allowed"
        )
    return found


def spread(numbers: Sequence[float], form: str) -> str:
    """The mean with its range, or the one number that there is."""
    if len(numbers) == 1:
        return format(numbers[0], form)
    return f"{format(mean(numbers), form)} ({format(min(numbers), form)} to {format(max(numbers), form)})"


def table(sides: dict[str, list[dict[str, Any]]], asked: argparse.Namespace) -> str:
    """The figures in markdown."""
    seeds = len(sides["nf4"])
    lines = [
        f"examples/qlora.yaml (rank 16, batch of 16) over {asked.rows:,} of its rows, {sides['nf4'][0]['steps']} steps; "
        f"{asked.held_out} held-out rows; {f'{seeds} seeds, mean with least and greatest' if seeds > 1 else 'one seed'}. "
        "Seconds a step are the median with the range, without the first step.",
        "",
        "| | held-out accuracy | loss | s a step | bytes of the base | the process grew by, loading | and in training |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, runs in sides.items():
        timed = [second for one in runs for second in one["seconds"][1:]]
        cells = (
            WAYS[way],
            spread(values(runs, "accuracy"), ".1%"),
            spread(values(runs, "loss"), ".4f"),
            f"{median(timed):.2f} ({min(timed):.2f} to {max(timed):.2f})",
            f"{runs[0]['base_bytes'] / 1e6:.1f} MB",
            f"{median(values(runs, 'held')) / 1e6:,.0f} MB",
            f"{median(values(runs, 'in_training')) / 1e6:,.0f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    few, plain = sides["nf4"], sides["none"]
    cells = (spread(values(few, "copy_accuracy"), ".1%"), spread(values(few, "copy_loss"), ".4f"))
    lines.append(f"| its float copy, merged | {' | '.join(cells)} | | | | |")
    difference = mean(values(few, "accuracy")) - mean(values(plain, "accuracy"))
    lines += [
        "",
        f"NF4 differs from bfloat16 by {100 * difference:+.1f} points, with a standard error of "
        f"{100 * paired_error(few, plain):.1f} (by held-out rows, the same for both); at most {100 * BELOW:.1f} below are "
        "allowed.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run all, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=480, help="rows to train on, of 2,000")
    parser.add_argument("--held-out", type=int, default=500, help="rows to measure accuracy on")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--way", choices=WAYS, help="measure this way alone, for a later run that has both")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--job", nargs=2, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        Path(asked.job[1]).write_text(json.dumps(run(json.loads(asked.job[0]))))
        return 0
    sides: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(asked.seeds):
        for way in WAYS if asked.way is None else (asked.way,):
            job = {"way": way, "seed": seed, "rows": asked.rows, "held_out": asked.held_out}
            sides[way].append(apart(job, asked.again))
            print(f"{WAYS[way]}, seed {seed}: {sides[way][-1]['accuracy']:.1%}", flush=True)
    if asked.way is not None:
        return 0
    text, failed = table(sides, asked), missed(sides)
    asked.output.parent.mkdir(exist_ok=True)
    record = {"machine": describe(), "sides": sides, "missed": failed, "markdown": text}
    asked.output.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    print(text)
    for line in failed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
