"""QLoRA beside LoRA on film reviews: accuracy, seconds and memory, each run in a process of its own; and its float copy.

    make bench-qlora             the table, benchmarks/results/qlora.json; fails where NF4 is more than 1.5 points of
                                 held-out accuracy below bfloat16, or its merged float copy is not what was trained
    BENCH_OPTIONS="--rows 500 --held-out 250"    smaller

Both runs are examples/qlora.yaml, once as it is and once with --quantize none: the same rows in the same order, the same seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from trainers.machine import describe, forget_peak, memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "qlora.json"
BELOW = 0.015
"""How far NF4's accuracy may be below bfloat16's."""
COPY = 0.01
"""How far the float copy's accuracy may be from the adapter's on its quantised base."""


def run(quantize: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate, and where the base was quantised merge into floats and evaluate once more; in this process."""
    from lorakit.algebra import merge
    from lorakit.train.config import load_config
    from lorakit.train.data import load_splits
    from lorakit.train.run import examine, hold, path_for, train

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quantize", quantize, "--train.output", folder, "--evaluate.before-and-after", "false"]
        flags += ["--data.limit", str(asked.rows), "--data.evaluation-limit", str(asked.held_out)]
        config = load_config(ROOT / "examples" / "qlora.yaml", flags)
        forget_peak()
        before = memory()
        result = train(config)
    found = {
        "accuracy": result.after.accuracy,
        "loss": result.after.loss,
        "seconds": result.record.seconds,
        "base_bytes": result.record.base_bytes,
        "grew": memory("VmHWM") - before,
    }
    if quantize != "none":
        merge(result.model, result.adapter.name, dtype=torch.bfloat16)
        held = hold(load_splits(config.data)[1], result.tokenizer, config)
        copy = examine(result.model, result.tokenizer, held, config, path_for(config, result.model))
        found |= {"copy_accuracy": copy.accuracy, "copy_loss": copy.loss}
    return found


def apart(quantize: str, asked: argparse.Namespace) -> dict[str, Any]:
    """`run` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "side.json"
        command = [sys.executable, __file__, "--side", quantize, "--output", str(result)]
        subprocess.run([*command, "--rows", str(asked.rows), "--held-out", str(asked.held_out)], check=True, cwd=ROOT)
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def missed(sides: dict[str, dict[str, Any]]) -> list[str]:
    """What the figures do not reach, in words."""
    found = []
    below = sides["bf16"]["accuracy"] - sides["nf4"]["accuracy"]
    if below > BELOW:
        found.append(f"NF4 is {100 * below:.1f} points below bfloat16; at most {100 * BELOW:.1f} are allowed")
    off = abs(sides["nf4"]["copy_accuracy"] - sides["nf4"]["accuracy"])
    if off > COPY:
        found.append(
            f"the float copy is {100 * off:.1f} points off what was trained; at most {100 * COPY:.1f} are allowed"
        )
    return found


def table(sides: dict[str, dict[str, Any]], asked: argparse.Namespace) -> str:
    """The figures in markdown."""
    lines = [
        f"{asked.rows:,} rows to train on, {asked.held_out:,} others to measure; examples/qlora.yaml: rank 16, one epoch of "
        "batch 16.",
        "",
        "| | held-out accuracy | loss | training, s | base | the process grew by |",
        "|---|---|---|---|---|---|",
    ]
    names = {"bf16": "LoRA on bfloat16", "nf4": "LoRA on NF4 (QLoRA)"}
    for key, side in sides.items():
        cells = (
            names[key],
            f"{side['accuracy']:.1%}",
            f"{side['loss']:.4f}",
            f"{side['seconds']:.0f}",
            f"{side['base_bytes'] / 1e6:.1f} MB",
            f"{side['grew'] / 1e6:,.0f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    few = sides["nf4"]
    lines.append(f"| its float copy, merged | {few['copy_accuracy']:.1%} | {few['copy_loss']:.4f} | | | |")
    return "\n".join(lines)


def main() -> int:
    """Run both, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--side")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.side:
        asked.output.write_text(json.dumps(run(asked.side, asked)))
        return 0
    sides = {"bf16": apart("none", asked), "nf4": apart("nf4", asked)}
    text, failed = table(sides, asked), missed(sides)
    asked.output.parent.mkdir(exist_ok=True)
    record = {"machine": describe(), "sides": sides, "missed": failed, "markdown": text}
    asked.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(text)
    for line in failed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
