"""PEFT's own tests against `lorakit.peft`: run them, or a share of them, and say what became of each.

    python tests/peft_suite/run.py FOLDER [--only test_config.py ...] [--share 20] [-n 2]

FOLDER holds PEFT's tests, for example that of `pip download peft==0.21.2 --no-binary peft --no-deps`, unpacked. Results are
kept beside the stand-ins in .cache/peft-suite, so that a run of some files adds to what is known of others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLOOR = 0.9
ABSENT = "lorakit.peft has no "


def prepare(folder: Path, place: Path) -> Path:
    """A package of the tests beside the stand-ins for the hub, which are built where they are not there."""
    tests = place / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(folder, tests, ignore=shutil.ignore_patterns("__pycache__"))
    (tests / "__init__.py").touch()
    marks = ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes", "regression")
    (place / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {mark}: PEFT's\n" for mark in marks))
    sys.path.insert(0, str(HERE.parent))
    from peft_suite.hub import build

    for problem in build(place / "hub"):
        print(f"no stand-in for {problem[:200]}")
    return tests


def run(tests: Path, place: Path, files: list[str], share: int, processes: str) -> None:
    """Run files of the tests; their lines go to results.jsonl."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "src"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "HF_HUB_CACHE": str(place / "hub"),
        "PEFT_TESTS": str(tests),
        "PEFT_SUITE_RESULTS": str(place / "results.jsonl"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"), "1"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(place / "pytest.ini"),
        "--rootdir",
        str(place),
        "-q",
        "--tb=short",
    ]
    command += ["-p", "peft_suite.plugin", "-p", "no:cacheprovider", "-p", "xdist", "-W", "ignore", "-n", processes]
    command += ["--share", str(share), *(str(tests / name) for name in files)]
    with (place / "output.txt").open("a") as output:
        subprocess.run(command, cwd=place, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)


def sorted_out(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kind, reason and row of every test: passed, skipped (by PEFT), absent (a name), standin (a model of the hub that is
    not here), explained, or failed."""
    table = tomllib.loads((HERE / "differences.toml").read_text())["difference"]
    for row in rows:
        cause = row.get("cause", "")
        if row["outcome"] == "passed":
            yield "passed", "", row
        elif row["outcome"] == "skipped":
            name = cause.partition(ABSENT)[2]
            yield ("absent", name, row) if name else ("skipped", cause, row)
        else:
            why = next((one for one in table if _is(one, row["test"], cause)), None)
            if why is None:
                yield "failed", re.sub(r"0x[0-9a-f]+|\d+|/\S+", "#", cause.split("\n")[0])[:150], row
            else:
                kind = why["kind"] if why["kind"] in ("absent", "standin") else "explained"
                yield kind, f"{why['kind']}: {why['why']}", row


def _is(one: dict[str, str], test: str, cause: str) -> bool:
    return bool(re.search(one.get("test", ""), test) and re.search(one.get("cause", ""), cause))


def report(place: Path) -> int:
    """Print what became of the tests that are known of; 1 below the floor or where a failure has no line."""
    lines = (place / "results.jsonl").read_text().splitlines()
    rows = list({row["test"]: row for row in map(json.loads, lines)}.values())
    kinds = ("passed", "explained", "failed", "absent", "standin", "skipped")
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    whole: Counter[str] = Counter()
    for kind, reason, row in sorted_out(rows):
        by_file[Path(row["test"].partition("::")[0]).name][kind] += 1
        whole[kind] += row.get("weight", 1)
        reasons[kind][reason] += 1
    print(f"{'file':36}{'run':>7}" + "".join(f"{kind:>11}" for kind in kinds))
    for file, counts in sorted(by_file.items()):
        print(f"{file:36}{sum(counts.values()):7,}" + "".join(f"{counts[kind]:11,}" for kind in kinds))
    total: Counter[str] = sum(by_file.values(), Counter())
    print(f"{'all':36}{len(rows):7,}" + "".join(f"{total[kind]:11,}" for kind in kinds))
    concerned = total["passed"] + total["explained"] + total["failed"]
    of_those = total["passed"] / max(1, concerned)
    share = whole["passed"] / max(1, whole["passed"] + whole["explained"] + whole["failed"])
    print(f"\nof {concerned:,} that ran and concern what exists {of_those:.1%} pass")
    print(f"of the whole suite, a test of a file run by share counted for its share: {share:.1%} (floor {FLOOR:.0%})")
    for kind, title in (
        ("absent", "not applicable, by name"),
        ("standin", "without a stand-in for the hub's model"),
        ("explained", "known differences"),
        ("failed", "unexplained"),
    ):
        print(f"\n{title}:")
        for reason, count in reasons[kind].most_common():
            print(f"  {count:6,}  {reason}")
    found = {
        "tests": len(rows),
        **total,
        "passed_of_those_that_ran": round(of_those, 4),
        "passed_of_the_suite": round(share, 4),
        "absent_by_name": dict(reasons["absent"].most_common()),
    }
    found["suite_by_weight"] = dict(whole)
    found["differences"] = dict(reasons["explained"].most_common())
    (ROOT / "benchmarks" / "results" / "peft_suite.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(share < FLOOR or bool(total["failed"]))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="PEFT's tests")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="these files of it")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="every N-th test of large files, by a hash")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--report", action="store_true", help="run nothing: say what is known")
    parser.add_argument("-n", default="2", metavar="PROCESSES")
    asked = parser.parse_args()
    place = ROOT / ".cache" / "peft-suite"
    place.mkdir(parents=True, exist_ok=True)
    if not asked.report:
        if not (asked.folder / "testing_common.py").is_file():
            parser.error(f"{asked.folder} holds no testing_common.py; name the folder tests of a checkout of PEFT.")
        tests = prepare(asked.folder.resolve(), place)
        if asked.again:
            (place / "results.jsonl").unlink(missing_ok=True)
        files = asked.only or sorted(path.name for path in tests.glob("test_*.py"))
        run(tests, place, files, asked.share, asked.n)
    return report(place)


if __name__ == "__main__":
    sys.exit(main())
