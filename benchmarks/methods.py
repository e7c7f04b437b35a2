"""Quality of every method on one task at one size: accuracy, loss, time, memory, and how large the adapter is.

    make bench-methods                                             every method, three seeds; over an hour on two cores
    make bench-methods BENCH_OPTIONS=--kept                        the rows measured so far, and which are missing
    make bench-methods BENCH_OPTIONS="--only 'LoRA; DoRA' --seeds 1"

Every row is `lorakit train` on film reviews, each method in a process of its own and one thread; several processes may run
side by side. What was measured with the same options stays in .cache/bench-methods and is not measured again. Results go to
benchmarks/results/methods.json, pictures to docs/pictures/, the table to docs/methods.md. There is no floor: the table says
what is, and the command fails only where a method cannot be trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quality.kept import add_options, chosen, measured
from quality.picture import draw_quality, draw_starts
from quality.settings import SETTINGS
from quality.tables import claims, quality_table
from trainers import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
PICTURES = ROOT / "docs" / "pictures"


def record(rows: list[dict[str, Any]], base: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the results file."""
    shared = {key: value for key, value in vars(options).items() if key in ("steps", "batch_size", "held_out")}
    return {
        "benchmark": "methods",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "libraries": {name: version(name) for name in ("lorakit", "torch", "transformers")},
        "options": {**shared, "seeds": list(options.seeds)},
        "base": base,
        "rows": rows,
        "markdown": quality_table(rows, base, shared, options.seeds) + "\n\n" + claims(rows),
    }


def main() -> int:
    """Measure, write, draw; 1 where a method failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seeds=3, steps=12, output=RESULTS)
    options = parser.parse_args()
    wanted = chosen(SETTINGS, options, parser)
    base, rows = measured(wanted, options)
    done = [row for row in rows if "failed" not in row]
    if not done:
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = record(done, base, options)
    if missing := [setting.name for setting in wanted if setting.name not in {row["name"] for row in rows}]:
        result["markdown"] += f"\n\nNot measured yet: {', '.join(missing)}."
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if not options.only:
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / "methods-quality.png").write_bytes(draw_quality(done))
        (PICTURES / "methods-starts.png").write_bytes(draw_starts(done))
    print(result["markdown"])
    return int(len(done) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
