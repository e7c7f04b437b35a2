"""Each edit on film reviews beside the base: does training it help, by how much, and what does it take?

    make bench-edits             one seed, 30 steps; the table, benchmarks/results/edits.json, docs/methods.md; fails where
                                 an edit is not above the base in accuracy and below it in loss

The runs are those of `make bench-methods`, with a table of their own because edits were given more steps. What was
measured with the same options stays in .cache/bench-methods and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from quality.kept import add_options, chosen, measured
from quality.settings import EDITS
from quality.tables import no_better, quality_table
from trainers import machine

RESULTS = Path(__file__).resolve().parent / "results" / "edits.json"


def main() -> int:
    """Measure and write; 1 where an edit failed or did not help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seeds=1, steps=30, output=RESULTS)
    options = parser.parse_args()
    base, rows = measured(chosen(EDITS, options, parser), options)
    done = [row for row in rows if "failed" not in row]
    if not done:
        return 1
    shared = {key: value for key, value in vars(options).items() if key in ("steps", "batch_size", "held_out")}
    failed = no_better(done, base)
    result = {
        "benchmark": "edits",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "libraries": {name: version(name) for name in ("lorakit", "torch", "transformers")},
        "options": {**shared, "seeds": list(options.seeds)},
        "base": base,
        "rows": done,
        "missed": failed,
        "markdown": quality_table(done, base, shared, options.seeds),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(result["markdown"])
    for line in failed:
        print(f"missed: {line}", file=sys.stderr)
    return int(bool(failed) or len(done) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
