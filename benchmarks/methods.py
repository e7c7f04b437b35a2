"""Quality of every method on one task at one size: accuracy, loss, time, memory, and how large the adapter is.

    make bench-methods                                             every method, three seeds; over an hour on two cores
    make bench-methods BENCH_OPTIONS="--only LoRA,DoRA --seeds 1"

Every row is `lorakit train` on film reviews, each method in a process of its own and one thread; several processes may run
side by side. What was measured with the same options stays in .cache/bench-methods and is not measured again. Results go to
benchmarks/results/methods.json, pictures to docs/pictures/, the table to docs/methods.md. There is no floor: the table says
what is, and the command fails only where a method cannot be trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import material
from quality.picture import draw_quality, draw_starts
from quality.settings import SETTINGS, Setting
from quality.tables import claims, quality_table
from trainers import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
PICTURES = ROOT / "docs" / "pictures"


def job_of(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What a process is told for one row: all that its figures depend on."""
    return {
        **setting.job(options.steps),
        "seeds": options.seeds,
        "batch_size": options.batch_size,
        "held_out": options.held_out,
        "model": str(material.fetch_model()),
        "reviews": str(material.cache_root() / "reviews"),
    }


def measured(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """One method over all seeds, from the cache or from a process of its own; with the number of its steps."""
    job = job_of(setting, options)
    return {"steps": job["steps"], **kept_or_run(job, options.again)}


def base_of(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and loss of the model as it came, on the same held-out rows."""
    job = {**job_of(Setting("the base", (), 0.0), options), "seeds": [], "steps": 0}
    return kept_or_run(job, options.again)


def kept_or_run(job: dict[str, Any], again: bool) -> dict[str, Any]:
    """What a job gives, from the cache or from a process of its own."""
    name = job["setting"]["name"]
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    kept = material.cache_root() / "bench-methods" / f"{digest}.json"
    if kept.is_file() and not again:
        row: dict[str, Any] = json.loads(kept.read_text())
        return row
    kept.parent.mkdir(parents=True, exist_ok=True)
    asked, log = kept.with_suffix(".job"), kept.with_suffix(".log")
    asked.write_text(json.dumps(job))
    begin = time.monotonic()
    with log.open("w") as written:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "quality.run", str(asked), str(kept)],
            cwd=ROOT / "benchmarks",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        print(f"{name}: failed; the end of {log}:\n{end}", flush=True)
        return {"name": name, "failed": end}
    row = json.loads(kept.read_text())
    found = ", ".join(f"{run['accuracy']:.1%}" for run in row["runs"])
    print(f"{name}: {found} ({time.monotonic() - begin:.0f} s)", flush=True)
    return row


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
    parser.add_argument("--only", default="", help="names of rows, separated by commas")
    parser.add_argument("--seeds", type=lambda text: list(range(int(text))), default=[0, 1, 2], help="how many seeds")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of each run")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a step")
    parser.add_argument("--held-out", type=int, default=120, help="rows of the held-out 500 to evaluate on")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes side by side, a thread each"
    )
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    unknown = set(wanted) - {setting.name for setting in SETTINGS}
    if unknown:
        parser.error(f"no row {sorted(unknown)[0]!r}; there are: {', '.join(setting.name for setting in SETTINGS)}")
    chosen = [setting for setting in SETTINGS if not wanted or setting.name in wanted]
    material.fetch_model()
    material.write_reviews()
    base = base_of(options)
    if "failed" in base:
        return 1
    with ThreadPoolExecutor(options.workers) as pool:
        rows = list(pool.map(lambda setting: measured(setting, options), chosen))
    done = [row for row in rows if "failed" not in row]
    if not done:
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = record(done, base["runs"][0], options)
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if not wanted:
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / "methods-quality.png").write_bytes(draw_quality(done))
        (PICTURES / "methods-starts.png").write_bytes(draw_starts(done))
    print(result["markdown"])
    return int(len(done) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
