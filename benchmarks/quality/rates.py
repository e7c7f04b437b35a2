"""Which learning rate suits a row: `python -m quality.rates --only "LoRA-XS; Tied-LoRA"` in benchmarks/, examples/ on the path.

A rate is judged by the mean training loss of a run's last quarter, on one seed, never by the held-out rows that the tables
report. Runs are kept as those of the tables are; what is found goes into settings.py by hand.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean

import material
from quality.kept import add_options, chosen, rows_of
from quality.settings import EDITS, SETTINGS


def main() -> None:
    """Try every named row at its rate times every factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seeds=1, steps=12, output=Path("nothing is written"))
    parser.add_argument("--factors", type=float, nargs="+", default=[0.1, 0.3], help="of the rate in settings.py")
    options = parser.parse_args()
    options.held_out = 1
    material.fetch_model()
    material.write_reviews()
    tries = [
        replace(setting, learning_rate=float(f"{setting.learning_rate * factor:.2g}"))
        for setting in chosen((*SETTINGS, *EDITS), options, parser)
        for factor in options.factors
    ]
    for setting, row in zip(tries, rows_of(tries, options), strict=True):
        for run in row.get("runs", []):
            last = run["losses"][-max(1, options.steps // 4) :]
            print(f"{setting.name} at {setting.learning_rate:g}: {mean(last):.3f}, first step {run['losses'][0]:.3f}")


if __name__ == "__main__":
    main()
