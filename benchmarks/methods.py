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
import sys
from pathlib import Path

from quality.kept import add_options, chosen, measured, record, write
from quality.picture import draw_quality, draw_starts
from quality.settings import SETTINGS
from quality.tables import claims

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
PICTURES = ROOT / "docs" / "pictures"


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
    below = "\n\n" + claims(done)
    if missing := [setting.name for setting in wanted if setting.name not in {row["name"] for row in rows}]:
        below += f"\n\nNot measured yet: {', '.join(missing)}."
    write(record("methods", base, done, options, after=below), options.output)
    if not options.only:
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / "methods-quality.png").write_bytes(draw_quality(done, base))
        (PICTURES / "methods-starts.png").write_bytes(draw_starts(done))
    return int(len(done) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
