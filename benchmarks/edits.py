"""Each edit on film reviews beside the base: does training it help, by how much, and what does it take?

    make bench-edits             one seed, 30 steps; the table, benchmarks/results/edits.json, docs/methods.md; fails where
                                 an edit is not above the base in accuracy and below it in loss

The runs are those of `make bench-methods`, with a table of their own because edits were given more steps. What was
measured with the same options stays in .cache/bench-methods and is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quality.kept import add_options, chosen, measured, record, write
from quality.settings import EDITS
from quality.tables import no_better

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
    failed = no_better(done, base)
    write({**record("edits", base, done, options), "missed": failed}, options.output)
    for line in failed:
        print(f"missed: {line}", file=sys.stderr)
    return int(bool(failed) or len(done) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
