"""Training speed and memory, side by side: lorakit, TRL + PEFT, and a PEFT loop written by hand.

    make bench-train                                        everything, a quarter of an hour on two quiet cores
    make bench-train BENCH_OPTIONS="--workloads a,b --rounds 1 --steps 6"
    make bench-train BENCH_OPTIONS=--full                   every side takes every step, on every workload

Each measurement is a process of its own, and the sides alternate. Before each, the machine must be quiet; what other
processes took meanwhile is noted with the row. All sides get the same tokens in the same order and start from the same
adapter weights, which is checked. Results go to benchmarks/results/train.json after every process, the picture to
docs/pictures/bench-train.png; the exit status is 1 where a floor is missed. docs/benchmarks.md says the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import material
from trainers import machine
from trainers.floors import SIDES, WORKLOADS, Row, floor_table, judge, steady, unequal_work, workload_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "train.json"
PICTURE = ROOT / "docs" / "pictures" / "bench-train.png"
LIBRARIES = ("lorakit", "torch", "transformers", "peft", "trl", "accelerate", "datasets")

NOISY = 0.05
"""A row is marked when other processes took a larger share of the cores than this."""

# Memory and speed of TRL are measured as one configures it for speed: bf16 weights, no checkpointing, no dropout.
FAST_SFT = {"bf16": False, "gradient_checkpointing": False, "completion_only_loss": None}


@dataclass(frozen=True)
class Side:
    """How a side is run: who does it, and what its job says besides."""

    doer: str
    job: dict[str, Any] = field(default_factory=dict)


DOERS = {
    "lorakit": Side("lorakit"),
    "dora": Side("lorakit", {"method": "dora"}),
    "trl": Side("trl", {"sft": FAST_SFT}),
    # float32 and dropout are named by TRL's ModelConfig, recomputing by its SFTConfig.
    "trl-defaults": Side("trl", {"precision": "fp32", "dropout": 0.05, "sft": {"bf16": False}}),
    "loop": Side("loop"),
    "trainer": Side("trainer"),
}


FEWER = {"trl-defaults": 1, "loop": 1, "dora": 2}
"""Without --full these sides are measured in the first rounds alone: no floor is about the slowest, and the others are far from
theirs."""


@dataclass(frozen=True)
class Workload:
    """Rows, batch, how many steps each side takes by default and with --full, and in how many rounds at most by default."""

    rows: str
    batch_size: int
    steps: dict[str, int]
    full: dict[str, int]
    data: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    rounds: int = 1


PLAN = {
    "a": Workload(
        "reviews-before.jsonl",
        16,
        {"lorakit": 8, "trl": 8, "dora": 5, "loop": 4, "trl-defaults": 2},
        {"lorakit": 32, "trl": 32, "dora": 32, "loop": 32, "trl-defaults": 32},
        rounds=3,
    ),
    "b": Workload(
        "reviews-after.jsonl",
        16,
        {"lorakit": 3, "trl": 3},
        {"lorakit": 32, "trl": 32, "loop": 32, "trl-defaults": 32},
    ),
    "c": Workload(
        "newspaper.jsonl",
        2,
        {"lorakit": 2, "trl": 2},
        {"lorakit": 32, "trl": 32, "loop": 32, "trl-defaults": 32},
        {"format": "text", "max_length": 2048},
    ),
    "d": Workload(
        "tweets.jsonl",
        32,
        {"lorakit": 30, "trainer": 30},
        {"lorakit": 60, "trainer": 60},
        {"format": "classification"},
        task="seq-cls",
    ),
}


@dataclass
class Run:
    """One run of the command: where it writes, what it has measured."""

    options: argparse.Namespace
    work: Path
    rows: list[Row] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    begin: float = field(default_factory=time.monotonic)
    finished: bool = False

    def say(self, line: str) -> None:
        """A line of progress with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        print(f"[{minutes:02}:{seconds:02}] {line}", flush=True)

    def do(self, name: str, job: dict[str, Any], *, measured: bool = True) -> dict[str, Any]:
        """One process: its result, with what the rest of the machine did meanwhile.

        Exits with the end of its output where it fails.
        """
        quiet = None
        if measured:
            quiet = machine.wait_until_quiet(NOISY, self.options.patience, self.say)
        path, result, log = (self.work / "jobs" / f"{name}.{kind}" for kind in ("json", "result.json", "log"))
        path.parent.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)
        job = {"output": str(self.work / "adapters" / name), **job, "result": str(result)}
        path.write_text(json.dumps(job, indent=1))
        before, begin = machine.busy_seconds(), time.monotonic()
        with log.open("w") as written:
            child = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "trainers.sides", str(path)],
                cwd=ROOT,
                env=environment(self.work),
                stdout=written,
                stderr=subprocess.STDOUT,
            )
            try:
                _, status, usage = os.wait4(child.pid, 0)
            except BaseException:
                child.kill()
                raise
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds, after = time.monotonic() - begin, machine.busy_seconds()
        if child.returncode or not result.exists():
            end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            sys.exit(f"{name}: the process ended with status {child.returncode}; the end of {log}:\n{end}")
        found: dict[str, Any] = json.loads(result.read_text())
        found["process_seconds"] = round(seconds, 2)
        if before is not None and after is not None:
            others = after - before - usage.ru_utime - usage.ru_stime
            found["others_share"] = round(max(0.0, others) / seconds / (os.cpu_count() or 1), 4)
            found["noisy"] = found["others_share"] > NOISY or (quiet or 0.0) > NOISY
        return found

    def measure(self, workload: str, side: str, number: int, job: dict[str, Any], **more: Any) -> Row:
        """A row of the results, and the file written anew."""
        name = f"{workload}-{side}-{number}" + ("-cold" if more.get("cold") else "")
        row = {"workload": workload, "side": side, "round": number, **more, **self.do(name, job)}
        self.rows.append(row)
        self.write()
        self.say(told(row))
        return row

    def write(self) -> None:
        """The results so far: a draft renamed, so that an interruption leaves the last whole file."""
        target: Path = self.options.output
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(".draft")
        draft.write_text(json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n")
        draft.replace(target)

    def record(self) -> dict[str, Any]:
        """Everything: when, where, with what, the raw rows, the verdicts, the tables."""
        warm = [row for row in self.rows if not row.get("cold")]
        verdicts = judge(warm)
        return {
            "benchmark": "train",
            "started": self.started,
            "minutes": round((time.monotonic() - self.begin) / 60, 1),
            "finished": self.finished,
            "options": {key: str(value) for key, value in vars(self.options).items()},
            "machine": machine.describe(),
            "libraries": {name: version(name) for name in LIBRARIES},
            "gemm_peak": gemm_peak(self.rows),
            "floors": [
                {
                    "name": verdict.floor.name,
                    "floor": verdict.floor.floor,
                    "aim": verdict.floor.aim,
                    "found": None if verdict.found is None else vars(verdict.found),
                    "verdict": verdict.word.strip("*"),
                }
                for verdict in verdicts
            ],
            "unequal_work": unequal_work(warm),
            "markdown": markdown(self),
            "rows": self.rows,
        }


def main() -> int:
    """What the command line asks for; 1 where a floor is missed."""
    options = read_options()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("bench-train: ended from outside")
    )  # the running side ends with it
    work = material.cache_root() / "bench-train"
    with alone(work):
        return measure(Run(options, work))


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Two of these at a time would measure each other, and write into the same folder: the second exits."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"bench-train: another one is running ({work}); wait for it, or end it.")
        yield


def measure(run: Run) -> int:
    """Measure everything, say it, draw it."""
    options = run.options
    write_rows(run)
    run.say(f"{', '.join(options.workloads)}; {options.rounds} rounds; results in {options.output}")
    for name in options.workloads:
        measure_workload(run, name)
    if "a" in options.workloads:
        found = run.do("attach", {**numbers(), "side": "attach", "precision": "bf16"})
        run.rows.append({"workload": "attach", "side": "attach", "round": 0, **found})
    run.finished = True
    run.write()
    draw(run)
    print("\n" + markdown(run))
    warm = [row for row in run.rows if not row.get("cold")]
    missed = [verdict.floor.name for verdict in judge(warm) if verdict.missed]
    complaints = unequal_work(warm)
    for line in (*(f"missed: {name}" for name in missed), *(f"unequal work: {line}" for line in complaints)):
        print(line, file=sys.stderr)
    return 1 if missed or complaints else 0


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=list(PLAN), help="some of a,b,c,d")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--seeds", type=int, default=3, help="seeds; round N uses seed N modulo this")
    parser.add_argument("--steps", type=int, help="steps of every side (default: see PLAN in the source)")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES), help="some of the sides")
    parser.add_argument("--full", action="store_true", help="every side takes every step, on every workload")
    parser.add_argument("--held-out", type=int, default=400, help="reviews that accuracy is measured on; 0: none")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for a quiet machine each time")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    unknown = set(options.workloads) - set(PLAN)
    if unknown:
        parser.error(f"--workloads: {', '.join(sorted(unknown))}; there are {', '.join(PLAN)}")
    if set(options.sides) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(set(options.sides) - set(SIDES)))}; there are {', '.join(SIDES)}")
    return options


def environment(work: Path) -> dict[str, str]:
    """What every process gets alike. OpenMP keeps its defaults: threads as many as cores, waiting as it does."""
    own = os.environ.copy()
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "examples"), own.get("PYTHONPATH", "")])
    own |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LORAKIT_CACHE": str(material.cache_root()),
        # Compiled code of this run alone, so that the first process of a workload shows what compiling costs.
        "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),
    }
    return own


# -- what is measured ------------------------------------------------------------------------------


def numbers() -> dict[str, Any]:
    """What all jobs have in common."""
    return {
        "model": str(material.fetch_model()),
        "rank": 16,
        "alpha": 32,
        "learning_rate": 5e-4,
        "precision": "bf16",
    }


def write_rows(run: Run) -> None:
    """The rows of the workloads that were asked for, and nothing left of an earlier run."""
    import shutil

    for stale in ("jobs", "adapters", "compiled"):
        shutil.rmtree(run.work / stale, ignore_errors=True)
    train, held_out = material.split_reviews(512, max(run.options.held_out, 1))
    for place in ("before", "after"):
        material.write_rows(run.work / f"reviews-{place}.jsonl", material.ask(train, place))
        material.write_rows(run.work / f"reviews-{place}-held-out.jsonl", material.ask(held_out, place))
    if "c" in run.options.workloads:
        target = str(run.work / "newspaper.jsonl")
        run.do("newspaper", {**numbers(), "side": "newspaper", "output": target}, measured=False)
    if "d" in run.options.workloads:
        train, held_out = material.split_reviews(2000, 500, name="tweets")
        for name, part in (("tweets", train), ("tweets-held-out", held_out)):
            rows = [{"text": row.text, "label": row.label} for row in part]
            material.write_rows(run.work / f"{name}.jsonl", rows)


def measure_workload(run: Run, name: str) -> None:
    """All rounds of a workload: in each the sides one after another, the first of them another one each time."""
    plan = PLAN[name]
    wanted = plan.full if run.options.full else plan.steps
    steps = {side: run.options.steps or count for side, count in wanted.items() if side in run.options.sides}
    if not steps:
        return
    run.say(f"({name}) {WORKLOADS[name]}")
    common = {
        **numbers(),
        "rows": str(run.work / plan.rows),
        "batch_size": plan.batch_size,
        "data": {"max_length": 1024, **plan.data},
    }
    if plan.task:
        common |= {"task": plan.task, "model": str(material.fetch_encoder())}
    if "lorakit" in steps and not any(row.get("cold") for row in run.rows):
        # Later workloads find most functions compiled by the first.
        job = {**common, "side": "lorakit", "steps": 3, "seed": 0}
        run.measure(name, "lorakit", -1, job, cold=True, seed=0)
    for number in range(run.options.rounds if run.options.full else min(run.options.rounds, plan.rounds)):
        seed = number % run.options.seeds
        start = run.work / "adapters" / f"{plan.task or 'causal-lm'}-start-{seed}"
        if not start.exists():  # the same for all workloads of a task
            job = {**common, "side": "start", "output": str(start), "seed": seed, "steps": 1}
            run.do(start.name, job, measured=False)
        taking = [side for side in steps if run.options.full or number < FEWER.get(side, number + 1)]
        for side in turned(taking, number):
            how = DOERS[side]
            job = {**common, "side": how.doer, **how.job, "seed": seed, "steps": steps[side], "start": str(start)}
            run.measure(name, side, number, job, seed=seed)
    if run.options.held_out:
        add_accuracy(run, name, common, max(steps.values()))


def is_scored(name: str, full: bool) -> bool:
    """Whether held-out accuracy says something about a workload: there are answers, and enough steps to learn them in."""
    return name in ("abd" if full else "ad")


def turned(sides: list[str], number: int) -> list[str]:
    """The sides in another order each round, so that none always comes first on a machine that warms up."""
    cut = number % len(sides)
    return sides[cut:] + sides[:cut]


def add_accuracy(run: Run, name: str, common: dict[str, Any], steps: int) -> None:
    """Held-out accuracy of every adapter that was trained through, one evaluator for all."""
    through = [
        row
        for row in run.rows
        if row["workload"] == name and not row.get("cold") and len(row["seconds"]) == steps and row["side"] != "dora"
    ]
    if not is_scored(name, run.options.full) or not through:
        return
    folders = {
        f"{row['side']}-{row['round']}": str(run.work / "adapters" / f"{name}-{row['side']}-{row['round']}")
        for row in through
    }
    held_out = str(run.work / PLAN[name].rows).replace(".jsonl", "-held-out.jsonl")
    job = {**common, "side": "score", "held_out": held_out, "adapters": folders, "seed": 0, "steps": 1}
    scores = run.do(f"{name}-score", job, measured=False)["scores"]
    for row in through:
        found = scores[f"{row['side']}-{row['round']}"]
        row |= {"accuracy": found["accuracy"], "held_out_loss": found["loss"]}
        run.say(f"({name}) {row['side']} round {row['round'] + 1}: {found['accuracy']:.1%} of held-out rows right")
    run.write()


# -- what is said ----------------------------------------------------------------------------------


def told(row: Row) -> str:
    """A row as a line of progress."""
    own = steady(row) or row["seconds"]
    title = "cold start" if row.get("cold") else f"round {row['round'] + 1}"
    line = (
        f"({row['workload']}) {title} {row['side']}: first step {row['seconds'][0]:.1f} s, then {sum(own) / len(own):.3f} s "
        f"a step, peak {row['memory_peak'] / 1e9:.2f} GB, loss {sum(row['losses']) / len(row['losses']):.4f}"
    )
    return line + (f"; NOISY: others took {row['others_share']:.0%} of the cores" if row.get("noisy") else "")


def gemm_peak(rows: Sequence[Row]) -> float | None:
    """The bf16 GEMM peak of the run: the best that any of its processes reached, in FLOP/s."""
    return max((row["gemm_peak"] for row in rows if "gemm_peak" in row), default=None)


def markdown(run: Run) -> str:
    """The section of docs/benchmarks.md."""
    return "\n\n".join(sections(run))


def sections(run: Run) -> Iterator[str]:
    """The floors, then each workload."""
    warm = [row for row in run.rows if not row.get("cold")]
    about = machine.describe()
    peak = gemm_peak(run.rows)
    noisy = [row for row in run.rows if row.get("noisy")]
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    told = (
        f"{run.started[:10]}, {about['processor']} ({', '.join(about.get('instructions', []))}), {about['cores']} cores, "
        f"{about.get('memory_gb', '?')} GB. {libraries}. "
    )
    if peak:
        told += f"The bf16 GEMM peak (2048³) of this run: {peak / 1e9:,.0f} GFLOP/s. "
    told += (
        f"{len(noisy)} of {len(run.rows)} processes shared the machine with others (over {NOISY:.0%} of the cores)."
        if noisy
        else "No process shared the machine with others."
    )
    yield told + ("" if run.finished else " **The run was interrupted.**")
    if run.finished and run.options.output == RESULTS:
        yield f"![Real tokens a second and peak memory of every side](pictures/{PICTURE.name})"
    yield floor_table(judge(warm))
    for name, title in WORKLOADS.items():
        if any(row["workload"] == name for row in warm):
            cold = next((row for row in run.rows if row["workload"] == name and row.get("cold")), None)
            note = (
                "" if cold is None else f" lorakit's first step with nothing compiled yet: {cold['seconds'][0]:.1f} s."
            )
            yield f"**({name}) {title}.**{note}"
            yield workload_table(warm, name, peak or 1.0)
    for complaint in unequal_work(warm):
        yield f"Unequal work: {complaint}."


def draw(run: Run) -> None:
    """The picture: tokens a second of every side, and peak memory, medians with their ranges."""
    from trainers.picture import draw_bars

    target = PICTURE if run.options.output == RESULTS else run.options.output.with_suffix(".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(draw_bars([row for row in run.rows if not row.get("cold")]))


if __name__ == "__main__":
    sys.exit(main())
