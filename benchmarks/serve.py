"""Serving many adapters, side by side: lorakit's engine, PEFT's mixed batches, transformers' continuous batching, vLLM.

    make bench-serve                                        everything, some minutes on two quiet cores
    make bench-serve BENCH_OPTIONS="--requests 16 --new 16 --sides lorakit"
    make bench-serve BENCH_OPTIONS="--vllm-python ~/vllm/bin/python"      with vLLM's CPU build, from an environment of its own

64 requests of 64 random tokens, 64 new ones each, greedy, at most 32 at once, on SmolLM2-135M in bfloat16; adapters over all
linear layers with ranks 8 and 16 alternating: none, 1, 8, 32 distinct. Each side is a process of its own, and its first, short
run is not counted. Besides, for lorakit: how much later a first token comes when the adapter has to be read, 1,000
adapters of which 100 fit into memory under Zipf-1.5, and the memory of 100 adapters. Results go to
benchmarks/results/serve.json; the exit status is 1 where a floor against what is installed is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import material
from trainers import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
SIDES = ("lorakit", "peft", "transformers")
DISTINCT = (0, 1, 8, 32)
KNOWN = {"vLLM 0.32, CPU build": (920, 194, 191, 186), "PEFT 0.21": (383, 233, 164, 82)}
"""Generated tokens per second for `DISTINCT`, measured before on two quiet cores that multiply matrices (AMX)."""
BATCH = 32
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}
"""Its environment where nothing else is said: 1 GB of keys and values, every core, the engine in its own process."""


# -- what everybody works on -------------------------------------------------------------------------------------------


def store() -> Path:
    """The folder of 32 adapters with random numbers, ranks 8 and 16 alternating; made once."""
    folder = material.cache_root() / "bench-serve" / "store"
    missing = [number for number in range(32) if not (folder / f"a{number:02d}" / "adapter_config.json").exists()]
    if missing:
        import torch

        import lorakit as lk

        model = base()
        for number in missing:
            torch.manual_seed(number)
            rank = 16 if number % 2 else 8
            adapter = lk.attach(model, lk.LoRA(rank=rank, alpha=2 * rank), name="written")
            for _, _, delta in adapter.deltas():
                torch.nn.init.normal_(delta.B, std=0.002)
            adapter.save(folder / f"a{number:02d}")
            lk.detach(model)
    return folder


def links(name: str, count: int, ranks: Sequence[int]) -> Path:
    """A store of `count` adapters whose files are those of the 32, so that a thousand need no more disk."""
    source, folder = store(), material.cache_root() / "bench-serve" / name
    kinds = [number for number in range(32) if (16 if number % 2 else 8) in ranks]
    for number in range(count):
        target = folder / f"{name}{number:04d}"
        if not target.exists():
            target.mkdir(parents=True)
            for file in (source / f"a{kinds[number % len(kinds)]:02d}").iterdir():
                os.link(file, target / file.name)
    return folder


def base() -> Any:
    """The model in bfloat16."""
    from lorakit.models.loading import load_model

    return load_model(material.fetch_model(), dtype="bfloat16")[0]


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, the same for every side."""
    draw = random.Random(0)
    return [[draw.randrange(100, 40000) for _ in range(length)] for _ in range(count)]


def vllm_side(python: str, job: dict[str, Any]) -> dict[str, Any]:
    """vLLM's CPU build, in the environment of this interpreter: the base without LoRA, and the adapters with it, each in a
    process of its own, since an engine is slower as soon as LoRA is on."""
    rows: dict[str, Any] = {}
    own = {
        "model": str(plain_model()),
        "store": str(store()),
        "prompts": prompts(job["requests"], job["prompt"]),
        "new": job["new"],
        "batch": BATCH,
    }
    wanted = job["vllm"]
    for distinct in filter(None, ([n for n in wanted if not n], [n for n in wanted if n])):
        command = [
            python,
            str(Path(__file__).parent / "peers" / "vllm_engine.py"),
            json.dumps(own | {"distinct": distinct}),
        ]
        environment = VLLM | {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"bench-serve: vLLM failed with {done.returncode}.")
        rows |= json.loads(done.stdout.splitlines()[-1])
    return rows


def plain_model() -> Path:
    """The base as a folder that transformers and vLLM read; made once."""
    folder = material.cache_root() / "bench-serve" / "model"
    if not (folder / "config.json").exists():
        from lorakit.models.loading import load_model

        model, tokenizer = load_model(material.fetch_model(), dtype="bfloat16")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def rate(run: Callable[[], int]) -> dict[str, float]:
    """Tokens per second of a run that returns how many tokens it made."""
    begin = time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - begin
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "tokens": tokens}


# -- the sides -----------------------------------------------------------------------------------------------------------


def lorakit_side(job: dict[str, Any]) -> dict[str, Any]:
    """lorakit's engine."""
    from lorakit.serve.engine.engine import LocalEngine
    from lorakit.serve.engine.scheduler import Limits
    from lorakit.serve.request import Request, Sampling

    texts, new = prompts(job["requests"], job["prompt"]), job["new"]
    numbers = iter(range(10**9))

    def ask(engine: LocalEngine, names: Sequence[str | None], count: int) -> int:
        sampling = Sampling(max_tokens=count, temperature=0, ignore_eos=True)
        tickets = [
            engine.submit(
                Request(
                    str(next(numbers)), tuple(texts[i % len(texts)]), {name: 1.0} if name else {}, sampling=sampling
                )
            )
            for i, name in enumerate(names)
        ]
        return sum(len(ticket.result()) for ticket in tickets)

    def cycle(names: Sequence[str], distinct: int) -> list[str | None]:
        return [names[i % distinct] if distinct else None for i in range(job["requests"])]

    rows: dict[str, Any] = {}
    model, folder = base(), store()
    # Prefixes are not shared, or the second run of a prompt would be cheaper than the first.
    limits = Limits(batch=BATCH, cache_bytes=256 << 20)
    engine = LocalEngine(model, folder, limits, reuse=False)
    engine.start()
    names = list(engine.adapters.names())
    ask(engine, [None] * BATCH, 4)
    for distinct in DISTINCT:
        for name in names[:distinct]:
            engine.adapters.load(name)
        ask(engine, cycle(names, distinct)[:BATCH], 4)
        mixed = cycle(names, distinct)
        rows[f"{distinct} distinct"] = rate(lambda mixed=mixed: ask(engine, mixed, new))  # type: ignore[misc]

    warm, cold = [], []
    for name in names[:9]:
        for times, is_cold in ((warm, False), (cold, True)):
            if is_cold:
                engine.adapters.unload(name)
            ticket = engine.submit(
                Request(str(next(numbers)), tuple(texts[0]), {name: 1.0}, sampling=Sampling(max_tokens=1))
            )
            ticket.result()
            times.append(1000 * (ticket.usage.first or 0))
    rows["first token"] = {
        "warm_ms": statistics.median(warm),
        "cold_ms": statistics.median(cold),
        "later_ms": statistics.median(cold) - statistics.median(warm),
    }
    each = sum(engine.adapters.info(name).bytes for name in names) / len(names)
    engine.stop()

    known = links("known", 1000, (8, 16))
    engine = LocalEngine(
        model, known, Limits(batch=BATCH, cache_bytes=256 << 20, adapter_bytes=int(100 * each)), reuse=False
    )
    engine.start()
    draw = random.Random(1)
    weights = [1 / (rank + 1) ** 1.5 for rank in range(1000)]
    names = list(engine.adapters.names())
    for name in names[:95]:  # the popular ones are there, as after an hour
        engine.adapters.load(name)
    ask(engine, [None] * 4, 4)
    rows["zipf"] = rate(lambda: ask(engine, draw.choices(names, weights, k=job["requests"]), new))
    stats = engine.stats()
    rows["zipf"] |= {"hits": stats.hits, "misses": stats.misses, "evictions": stats.evictions}
    engine.stop()

    engine = LocalEngine(model, links("memory", 100, (8,)), limits, reuse=False)
    engine.start()
    ask(engine, [None] * BATCH, 4)
    before = machine.memory()
    for name in engine.adapters.names():
        engine.adapters.load(name)
    rows["memory"] = {"gigabytes": (machine.memory() - before) / 1e9, "adapters": engine.adapters.bytes / 1e9}
    engine.stop()
    return rows


def peft_side(job: dict[str, Any]) -> dict[str, Any]:
    """PEFT's `generate` with `adapter_names`, in batches of 32."""
    import torch
    from peft import PeftModel

    texts = torch.tensor(prompts(job["requests"], job["prompt"]))
    model, folder = base(), store()
    names = sorted(path.name for path in folder.iterdir())
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(model: Any, distinct: int, new: int, requests: int) -> int:
        total = 0
        for first in range(0, requests, BATCH):
            ids = texts[first : first + BATCH]
            own: dict[str, Any] = {}
            if distinct:
                own["adapter_names"] = [names[(first + row) % distinct] for row in range(len(ids))]
            with torch.inference_mode():
                found = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    **own,
                    **options,
                )
            total += found[:, ids.shape[1] :].numel()
        return total

    generate(model, 0, 2, BATCH)
    rows = {"0 distinct": rate(lambda: generate(model, 0, job["new"], job["requests"]))}
    begin = time.perf_counter()
    wrapped = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0]).eval()
    for name in names[1:]:
        wrapped.load_adapter(str(folder / name), adapter_name=name)
    rows["loading"] = {"seconds": time.perf_counter() - begin}
    for distinct in DISTINCT[1:]:
        generate(wrapped, distinct, 2, BATCH)
        rows[f"{distinct} distinct"] = rate(
            lambda distinct=distinct: generate(wrapped, distinct, job["new"], min(job["requests"], BATCH))  # type: ignore[misc]
        )
    return rows


def transformers_side(job: dict[str, Any]) -> dict[str, Any]:
    """transformers' continuous batching, for the base alone: it knows no adapters."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, texts = base(), prompts(job["requests"], job["prompt"])

    def generate(requests: int, new: int) -> int:
        found = model.generate_batch(
            inputs=texts[:requests],
            generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32,
                num_blocks=256,
                max_batch_tokens=512,
                max_requests_per_batch=BATCH,
                allow_block_sharing=False,
            ),
        )
        return sum(len(answer.generated_tokens) for answer in found.values())

    generate(4, 2)
    return {"0 distinct": rate(lambda: generate(job["requests"], job["new"]))}


# -- what came out -------------------------------------------------------------------------------------------------------


def speed(rows: dict[str, Any], side: str, distinct: int) -> float | None:
    """Tokens per second of a side, if it was measured."""
    row = rows.get(side, {}).get(f"{distinct} distinct")
    return None if row is None else float(row["tokens_per_second"])


def floors(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Every floor that these rows can be held to: what, found, floor, and whether it is met."""
    own, found = rows.get("lorakit", {}), []

    def hold(what: str, value: float | None, floor: float, unit: str, at_most: bool = False) -> None:
        if value is not None:
            met = value <= floor if at_most else value >= floor
            found.append({"what": what, "found": value, "floor": floor, "unit": unit, "at_most": at_most, "met": met})

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    ours, bare, mixed = speed(rows, "lorakit", 32), speed(rows, "lorakit", 0), speed(rows, "peft", 32)
    hold("base only, against vLLM's CPU build", ratio(bare, speed(rows, "vllm", 0)), 1, "×")
    hold("32 distinct adapters, against vLLM's", ratio(ours, speed(rows, "vllm", 32)), 3, "×")
    hold("32 distinct adapters, against PEFT's mixed batch", ratio(ours, mixed), 6, "×")
    hold("32 distinct against own base only", ratio(ours, bare), 0.55, "×")
    if "first token" in own:
        hold("cold adapter: first token later than warm by", own["first token"]["later_ms"], 60, " ms", at_most=True)
        hold(
            "1,000 known, 100 in memory, Zipf-1.5, against 32 resident",
            ratio(own["zipf"]["tokens_per_second"], ours),
            0.7,
            "×",
        )
        # What the process grew by is too little where it takes up memory that earlier engines had freed.
        hold("memory of 100 rank-8 adapters", max(own["memory"].values()), 0.7, " GB", at_most=True)
    return found


def markdown(record: dict[str, Any]) -> str:
    """The tables for docs/benchmarks.md."""
    job, rows = record["job"], record["rows"]
    lines = [
        f"{job['requests']} requests, prompt {job['prompt']}, {job['new']} new tokens, greedy, at most {BATCH} at once; "
        f"generated tokens per second. {record['date']}, {record['cores']} cores, {record['others']:.0%} of them busy with "
        f"others at the start; bfloat16 products at {record['peak']:.0f} GFLOP/s before and {record['peak_after']:.0f} after.",
        "",
        "| distinct adapters | " + " | ".join(map(str, DISTINCT)) + " |",
        "|---|" + "---|" * len(DISTINCT),
    ]
    for side in rows:
        if speed(rows, side, 0) is not None:
            cells = ["-" if (found := speed(rows, side, n)) is None else f"{found:.0f}" for n in DISTINCT]
            lines.append(f"| {side} {record['versions'].get(side, '')} | " + " | ".join(cells) + " |")
    for name, figures in KNOWN.items():
        lines.append(f"| {name} (on a processor with AMX, not of this run) | " + " | ".join(map(str, figures)) + " |")
    lines += ["", "| | found | floor | |", "|---|---|---|---|"]
    for floor in record["floors"]:
        sign = "≤" if floor["at_most"] else "≥"
        lines.append(
            f"| {floor['what']} | {floor['found']:.2f}{floor['unit']} | {sign} {floor['floor']}{floor['unit']} | "
            f"{'met' if floor['met'] else '**missed**'} |"
        )
    return "\n".join(lines)


def run_side(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"bench-serve: the side {side} failed with {done.returncode}.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--vllm-python", help="an interpreter that has vLLM's CPU build: it is measured as well")
    parser.add_argument(
        "--vllm-distinct", default=",".join(map(str, DISTINCT)), help="how many adapters it is measured with"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        sides = {"lorakit": lorakit_side, "peft": peft_side, "transformers": transformers_side}
        print(json.dumps(sides[arguments.side](json.loads(arguments.job))))
        return
    job: dict[str, Any] = {"requests": arguments.requests, "prompt": arguments.prompt, "new": arguments.new}
    job["vllm"] = [int(count) for count in arguments.vllm_distinct.split(",")]
    others = machine.others_share() or 0.0
    record: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "cores": os.cpu_count(),
        "job": job,
        "others": others,
        "peak": machine.gemm_peak() / 1e9,
        "versions": {side: version(side) for side in SIDES},
        "rows": {},
    }
    store()
    sides = arguments.sides.split(",")
    for side in sides if "vllm" in sides or not arguments.vllm_python else [*sides, "vllm"]:
        print(f"{side} …", flush=True)
        if side == "vllm":
            if not arguments.vllm_python:
                raise SystemExit("bench-serve: the side vllm needs --vllm-python.")
            record["rows"][side] = vllm_side(arguments.vllm_python, job)
            record["versions"][side] = record["rows"][side].pop("version")["vllm"]
        else:
            record["rows"][side] = run_side(side, job)
        for name, row in record["rows"][side].items():
            print(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
        record["peak_after"] = machine.gemm_peak() / 1e9
        record["floors"] = floors(record["rows"])
        record["markdown"] = markdown(record)
        RESULTS.write_text(
            json.dumps(record, indent=1) + "\n"
        )  # so that what has been measured is there if a later side fails
    print(record["markdown"])
    sys.exit(any(not floor["met"] for floor in record["floors"]))


if __name__ == "__main__":
    main()
