"""Hold every architecture of transformers to the laws: `make sweep`, or python tests/sweep/run.py --help.

Each model is checked in a process of its own, so that a crash or a lack of memory ends that model and nothing else. What is
found is kept as it comes; a second run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sweep import checks
from sweep.builder import Case, cases
from sweep.others import other_cases

ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "sweep.json"
MEMORY = 8 << 30
"""Bytes that one model may take."""


def _quiet() -> None:
    import logging

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def _child(pipe: Connection, case: Case) -> None:
    _quiet()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    pipe.send(checks.check(case).as_data())
    pipe.close()


def sweep(chosen: list[Case], output: Path, workers: int, limit: float) -> dict[str, Any]:
    """Check these models, `workers` at a time, each within `limit` seconds; results by class name, kept in `output`."""
    results: dict[str, Any] = json.loads(output.read_text())["models"] if output.is_file() else {}
    waiting = [case for case in chosen if case.name not in results]
    print(f"{len(chosen)} models, {len(chosen) - len(waiting)} known already")
    if waiting:  # what every model needs is imported once
        checks.check(next(case for case in cases() if case.name == "LlamaForCausalLM"))
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Any, Case, float]] = {}
    kept = time.monotonic()
    while waiting or running:
        while waiting and len(running) < workers:
            case = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, case))
            process.start()
            theirs.close()
            running[ours] = (process, case, time.monotonic())
        for pipe in wait(list(running), timeout=0.5):
            process, case, begun = running.pop(pipe)
            try:
                result = pipe.recv()
            except EOFError:
                process.join()
                result = _ended(case, "CRASH", f"the process ended with code {process.exitcode}")
            process.join(1)
            _note(results, result)
        for pipe, (process, case, begun) in list(running.items()):
            if time.monotonic() - begun > limit:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                running.pop(pipe)
                _note(results, _ended(case, "cannot be built", f"took longer than {limit:.0f} s"))
        if time.monotonic() - kept > 5 or not (waiting or running):
            kept = time.monotonic()
            write(results, output)
    return results


def _ended(case: Case, outcome: str, reason: str) -> dict[str, Any]:
    return checks.Result(case.name, case.model_type, case.head, outcome, reason).as_data()


def _note(results: dict[str, Any], result: dict[str, Any]) -> None:
    results[result["model"]] = result
    if result["outcome"] not in ("passed", "cannot be built"):
        print(f"{result['outcome']:16} {result['model']}: {result['reason'][:300]}", flush=True)


def write(results: dict[str, Any], output: Path) -> None:
    """The results with the table of the page, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".part")
    record = {"markdown": table(results), "models": dict(sorted(results.items()))}
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(output)


def table(results: dict[str, Any]) -> str:
    """The table of the page: one line per head, and every model that is refused or fails, with its reason."""
    import torch
    import transformers

    tried = [one for one in results.values() if one["outcome"] not in ("cannot be built", "base fails")]
    passed = [one for one in tried if one["outcome"] == "passed"]
    lines = [
        f"**All holds in {len(passed)} of the {len(tried)} model classes** that could be built small and run, out of "
        f"{len(results)} tried (transformers {transformers.__version__}, torch {torch.__version__}).",
        "",
        "| head | " + " | ".join(checks.OUTCOMES) + " | adapted share, median |",
        "|---" * (len(checks.OUTCOMES) + 2) + "|",
    ]
    for head in sorted({one["head"] for one in results.values()}):
        own = [one for one in results.values() if one["head"] == head]
        counts = Counter(one["outcome"] for one in own)
        shares = sorted(one["share"] for one in own if one["outcome"] == "passed")
        middle = f"{shares[len(shares) // 2]:.1%}" if shares else "-"
        cells = " | ".join(str(counts[outcome] or "") for outcome in checks.OUTCOMES)
        lines.append(f"| {head.replace('_', ' ')} | {cells} | {middle} |")
    named = [one for one in tried if one["outcome"] != "passed"]
    if named:
        lines += ["", "| model | outcome | reason |", "|---|---|---|"]
        for one in sorted(named, key=lambda one: (one["outcome"], one["model"])):
            reason = re.sub(r"[|<>]", " ", one["reason"])[:200]
            lines.append(f"| `{one['model']}` | {one['outcome']} | {reason} |")
    low = [one for one in passed if one["share"] < 0.95]
    if low:
        lines += ["", "Passed with less than 95% of the matrix numbers adapted by `all-linear`:", ""]
        lines += ["| model | share | left out |", "|---|---|---|"]
        for one in sorted(low, key=lambda one: one["share"]):
            most = sorted(one["left"].items(), key=lambda item: -item[1])[:3]
            words = ", ".join(f"`{kind}` {share:.1%}" for kind, share in most)
            lines.append(f"| `{one['model']}` | {one['share']:.1%} | {words} |")
    return "\n".join(lines)


def census() -> list[tuple[float, str, str]]:
    """Share that all-linear reaches in every causal architecture at its default sizes, on the meta device, few layers."""

    from lorakit.adapter.coverage import coverage
    from lorakit.adapter.targets import Targets, select
    from lorakit.errors import LorakitError
    from sweep.builder import full_size

    found: list[tuple[float, str, str]] = []
    for case in cases():
        if case.head != "causal_lm":
            continue
        try:
            model = full_size(case)
        except Exception as problem:
            found.append((-1.0, case.name, f"not built: {type(problem).__name__}: {problem}"[:120]))
            continue
        try:
            reached = coverage(model, select(model, Targets()))
        except LorakitError as problem:
            found.append((0.0, case.name, str(problem)))
            continue
        most = sorted(reached.left.items(), key=lambda item: -item[1])[:6]
        said = "; ".join(f"{ending}: {reason}" for ending, reason in reached.reasons.items())
        words = ", ".join(f"{kind} {count / reached.total:.1%}" for kind, count in most)
        found.append((reached.share, case.name, words + (f" ({said})" if said else "")))
    return sorted(found)


def main() -> int:
    """The command; its exit status is 1 where something is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", help="a regular expression that a class or model_type must match")
    parser.add_argument("--shard", help="i/n: every n-th model, from the i-th (counted from 1)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where results are kept and read again")
    parser.add_argument("--again", help="outcomes to check again, e.g. WRONG,CRASH, or all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="models at a time")
    parser.add_argument("--limit", type=float, default=90, help="seconds per model")
    parser.add_argument("--census", action="store_true", help="only the share of matrix numbers in causal models")
    given = parser.parse_args()
    _quiet()
    if given.census:
        found = census()
        for share, name, words in found:
            if share < 0.95:
                print(f"{share:7.1%} {name}: {words}" if share >= 0 else f"        {name}: {words}")
        built = [share for share, _, _ in found if share >= 0]
        print(f"{sum(share >= 0.95 for share in built)} of {len(built)} causal models: 95% or more")
        return 0
    chosen = [*cases(), *other_cases()]
    if given.only:
        chosen = [case for case in chosen if re.search(given.only, case.name) or re.search(given.only, case.model_type)]
    if given.shard:
        index, count = map(int, given.shard.split("/"))
        chosen = chosen[index - 1 :: count]
    if given.again and given.output.is_file():
        again, names = given.again.split(","), {case.name for case in chosen}
        record = json.loads(given.output.read_text())
        record["models"] = {
            name: one
            for name, one in record["models"].items()
            if name not in names or (given.again != "all" and one["outcome"] not in again)
        }
        write(record["models"], given.output)
    results = sweep(chosen, given.output, given.workers, given.limit)
    counts = Counter(results[case.name]["outcome"] for case in chosen if case.name in results)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return 1 if counts["WRONG"] or counts["CRASH"] else 0


if __name__ == "__main__":
    sys.exit(main())
