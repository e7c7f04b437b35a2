"""Rows of the quality tables, each from a process of its own; what was measured with the same options is kept."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import material
from quality.settings import Setting
from quality.tables import quality_table
from trainers import machine

BENCHMARKS = Path(__file__).resolve().parent.parent
BASE = Setting("the base", (), 1e-3)
"""The model as it came: measured and not trained, so that its learning rate is nobody's."""


def add_options(parser: argparse.ArgumentParser, *, seeds: int, steps: int, output: Path) -> None:
    """The options that the tables share, with what they are by default."""
    parser.add_argument("--only", default="", help="names of rows, separated by semicolons")
    parser.add_argument(
        "--seeds", type=lambda text: list(range(int(text))), default=list(range(seeds)), help="how many seeds"
    )
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps of each run")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a step")
    parser.add_argument("--held-out", type=int, default=120, help="rows of the held-out 500 to evaluate on")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes side by side, a thread each"
    )
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--kept", action="store_true", help="the rows measured so far, and which are missing")
    parser.add_argument("--output", type=Path, default=output, help="where the results go")


def chosen(settings: Sequence[Setting], options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Setting]:
    """The rows that `--only` names; all where it names none."""
    wanted = [name.strip() for name in options.only.split(";") if name.strip()]
    unknown = set(wanted) - {setting.name for setting in settings}
    if unknown:
        parser.error(f"no row {sorted(unknown)[0]!r}; there are: {'; '.join(setting.name for setting in settings)}")
    return [setting for setting in settings if not wanted or setting.name in wanted]


def measured(settings: Sequence[Setting], options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The base's accuracy and loss, and a row for each setting; a row that failed has "failed" and no runs. With `--kept` a row
    that is not there is left out."""
    material.fetch_model()
    material.write_reviews()
    base = _row({**_job(BASE, options), "seeds": [], "steps": 0}, options.again)
    if "failed" in base:
        return base, []
    if options.kept:
        settings = [setting for setting in settings if _place(_job(setting, options)).is_file()]
    return base["runs"][0], rows_of(settings, options)


def rows_of(settings: Sequence[Setting], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each setting, several at a time; the model and the reviews are there."""
    with ThreadPoolExecutor(options.workers) as pool:
        return list(pool.map(lambda setting: _row(_job(setting, options), options.again), settings))


def record(
    benchmark: str, base: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace, *, after: str = ""
) -> dict[str, Any]:
    """Everything that goes into a results file; `after` is what the page says below the table."""
    shared = {key: value for key, value in vars(options).items() if key in ("steps", "batch_size", "held_out")}
    return {
        "benchmark": benchmark,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "libraries": {name: version(name) for name in ("lorakit", "torch", "transformers")},
        "options": {**shared, "seeds": list(options.seeds)},
        "base": base,
        "rows": rows,
        "markdown": quality_table(rows, base, shared, options.seeds) + after,
    }


def write(result: dict[str, Any], path: Path) -> None:
    """The results file, and its table for who waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(result["markdown"])


def _job(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What a process is told for one row: all that its figures depend on."""
    return {
        "setting": asdict(setting),
        "seeds": options.seeds,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "held_out": options.held_out,
        "model": str(material.fetch_model()),
        "reviews": str(material.cache_root() / "reviews"),
    }


def _place(job: dict[str, Any]) -> Path:
    """Where a job's row is kept."""
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    return material.cache_root() / "bench-methods" / f"{digest}.json"


def _row(job: dict[str, Any], again: bool) -> dict[str, Any]:
    """What a job gives, from the cache or from a process of its own."""
    name, kept = job["setting"]["name"], _place(job)
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
            cwd=BENCHMARKS,
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
