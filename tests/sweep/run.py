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
from sweep.others import missing, other_cases

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


def write(results: dict[str, Any], output: Path, census: list[dict[str, Any]] | None = None) -> None:
    """The results with the text of the page, whole or not at all; an earlier census is kept."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".part")
    if census is None and output.is_file():
        census = json.loads(output.read_text()).get("census")
    census = census or []
    text = "\n".join(
        [*_headline(results), *_heads(results), *_limits(results), *_untried(results), *_census_page(census)]
    )
    record = {"markdown": text, "census": census, "models": dict(sorted(results.items()))}
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(output)


# -- the page --------------------------------------------------------------------------------------------------------------

UNTRIED = ("cannot be built", "base fails")


def _with(results: dict[str, Any], *outcomes: str) -> list[dict[str, Any]]:
    return [one for _, one in sorted(results.items()) if one["outcome"] in outcomes]


def _headline(results: dict[str, Any]) -> list[str]:
    import peft
    import torch
    import transformers

    passed, tried = _with(results, "passed"), len(results) - len(_with(results, *UNTRIED))
    equal = [one for one in passed if one["peft"].startswith("equal")]
    but = [one for one in equal if one["peft"] != "equal"]
    back = sum(one["back"] == "equal" for one in passed)
    absent = missing()
    return [
        f"**All holds in {len(passed)} of the {tried} model classes** that could be built small and run, out of "
        f"{len(results)} (transformers {transformers.__version__}, torch {torch.__version__}"
        + (f"; not installed here, so not among them: {', '.join(absent)})." if absent else ")."),
        "",
        f"PEFT {peft.__version__} loads the file that lorakit writes and gives the same output in {len(equal)} of these "
        f"{len(passed)}, in {len(but)} of them but for layers whose weights the model reads; of a random share of {back}, a "
        "file that PEFT writes gives the same output in lorakit.",
        "",
    ]


def _heads(results: dict[str, Any]) -> list[str]:
    lines = [
        "| head | " + " | ".join(checks.OUTCOMES) + " | as PEFT | adapted share, median |",
        "|---" * (len(checks.OUTCOMES) + 3) + "|",
    ]
    for head in sorted({one["head"] for one in results.values()}):
        own = [one for one in results.values() if one["head"] == head]
        counts = Counter(one["outcome"] for one in own)
        shares = sorted(one["share"] for one in own if one["outcome"] == "passed")
        middle = f"{shares[len(shares) // 2]:.1%}" if shares else "-"
        cells = " | ".join(str(counts[outcome] or "") for outcome in checks.OUTCOMES)
        equal = sum(one["peft"].startswith("equal") for one in own)
        lines.append(f"| {head.replace('_', ' ')} | {cells} | {equal or ''} | {middle} |")
    return lines


def _limits(results: dict[str, Any]) -> list[str]:
    """What is wrong, refused, left out, or not taken by PEFT, by name."""
    named, passed = _with(results, "WRONG", "CRASH", "refused"), _with(results, "passed")
    lines: list[str] = []
    if named:
        lines += ["", "| model | outcome | reason |", "|---|---|---|"]
        lines += [f"| `{one['model']}` | {one['outcome']} | {_clean(one['reason'])} |" for one in named]
    reasons: dict[str, list[str]] = {}
    for one in passed:
        for reason, share in one["why"].items():
            if share >= 0.001:
                reasons.setdefault(reason, []).append(f"`{one['model']}` {share:.1%}")
    if reasons:
        lines += [
            "",
            "What `all-linear` leaves out, with the share of the matrix numbers (0.1% or more; small models have small blocks, "
            "so that their stems weigh more than at full size):",
            "",
            "| reason | models | which |",
            "|---|---|---|",
        ]
        for reason, models in sorted(reasons.items(), key=lambda item: -len(item[1])):
            lines.append(f"| {reason} | {len(models)} | {_some(models)} |")
    words: dict[str, list[str]] = {}
    for one in passed:
        if one["peft"] != "equal":
            words.setdefault(_kind_of_problem(one["peft"]), []).append(f"`{one['model']}`")
    if words:
        lines += [
            "",
            "What PEFT does not take, or takes otherwise:",
            "",
            "| in PEFT's words | models | which |",
            "|---|---|---|",
        ]
        for reason, models in sorted(words.items(), key=lambda item: -len(item[1])):
            lines.append(f"| {reason} | {len(models)} | {_some(models)} |")
    inside = [f"`{one['model']}`" for one in passed if one["inside"]]
    if inside:
        lines += ["", f"The output is choices, so that what the parts give is compared: {', '.join(inside)}."]
    return lines


def _untried(results: dict[str, Any]) -> list[str]:
    words: dict[tuple[str, str], list[str]] = {}
    for one in _with(results, *UNTRIED):
        words.setdefault((one["outcome"], _kind_of_problem(one["reason"])), []).append(f"`{one['model']}`")
    if not words:
        return []
    lines = [
        "",
        "Not tried, since the builder finds no small model that runs:",
        "",
        "| outcome | reason | models |",
        "|---|---|---|",
    ]
    for (outcome, reason), models in sorted(words.items(), key=lambda item: (item[0][0], -len(item[1]))):
        lines.append(f"| {outcome} | {reason} | {_some(models, 12)} |")
    return lines


def _clean(words: str) -> str:
    return re.sub(r"[|<>{}\[\]*_`]", " ", " ".join(words.split()))[:160].strip()


def _kind_of_problem(words: str) -> str:
    """The first sentence of a reason, without what differs from model to model."""
    words = words.partition(": ")[2] if words.startswith(("names: ", "heads kept: ")) else words
    words = re.sub(r"\(.*", "", words.partition("; ")[0].partition(". ")[0])
    words = re.sub(r"\b\w*(Model|For\w+|Loss|Backbone)\b", "…", words)
    return _clean(re.sub(r"[\d,.]*\d", "N", words))


def _some(models: list[str], most: int = 40) -> str:
    return ", ".join(models[:most]) + (f" and {len(models) - most} more" if len(models) > most else "")


def _census_page(found: list[dict[str, Any]]) -> list[str]:
    built = [one for one in found if one["share"] is not None]
    if not built:
        return []
    enough = sum(one["share"] >= 0.95 for one in built)
    lines = [
        "",
        "## At full size",
        "",
        f"**`all-linear` reaches 95% or more of the matrix numbers in {enough} of {len(built)} causal architectures** with the "
        "sizes of their default configurations, few layers. Those of which it leaves out 0.1% or more, and what:",
        "",
        "| model | share | left out |",
        "|---|---|---|",
    ]
    for one in sorted(built, key=lambda one: one["share"]):
        left = [(kind, share, reason) for kind, share, reason in one["left"] if share >= 0.001]
        if left:
            words = "; ".join(f"`{kind}` {share:.1%}: {reason}" for kind, share, reason in left)
            lines.append(f"| `{one['model']}` | {one['share']:.1%} | {words} |")
    for one in found:
        if one["share"] is None:
            lines.append(f"| `{one['model']}` | not built | {_clean(one['reason'])} |")
    return lines


def census() -> list[dict[str, Any]]:
    """Share that all-linear reaches in every causal architecture at its default sizes, on the meta device, few layers, and
    what it leaves out: (kind of weight, share, reason)."""
    from lorakit.adapter.coverage import coverage
    from lorakit.adapter.targets import Targets, select
    from lorakit.errors import LorakitError
    from sweep.builder import full_size

    found: list[dict[str, Any]] = []
    for case in cases():
        if case.head != "causal_lm":
            continue
        try:
            model = full_size(case)
            reached = coverage(model, select(model, Targets()))
        except Exception as problem:
            share = 0.0 if isinstance(problem, LorakitError) else None
            found.append(
                {"model": case.name, "share": share, "left": [], "reason": f"{type(problem).__name__}: {problem}"}
            )
            continue
        reasons = checks.why_left(model, reached)
        left = sorted(reached.left.items(), key=lambda item: -item[1])
        left = [(kind, round(count / reached.total, 5), reasons[kind]) for kind, count in left]
        found.append({"model": case.name, "share": round(reached.share, 5), "left": left, "reason": ""})
    return found


def main() -> int:
    """The command; its exit status is 1 where something is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", help="a regular expression that a class or model_type must match")
    parser.add_argument("--shard", help="i/n: every n-th model, from the i-th (counted from 1)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where results are kept and read again")
    parser.add_argument("--again", help="outcomes to check again, e.g. WRONG,CRASH, or all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="models at a time")
    parser.add_argument("--limit", type=float, default=90, help="seconds per model")
    parser.add_argument(
        "--census", action="store_true", help="only the share of matrix numbers in causal models at full size"
    )
    given = parser.parse_args()
    _quiet()
    if given.census:
        found = census()
        write(json.loads(given.output.read_text())["models"] if given.output.is_file() else {}, given.output, found)
        print("\n".join(_census_page(found)))
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
    if not (given.only or given.shard):
        write(results, given.output, census())
    counts = Counter(results[case.name]["outcome"] for case in chosen if case.name in results)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return 1 if counts["WRONG"] or counts["CRASH"] else 0


if __name__ == "__main__":
    sys.exit(main())
