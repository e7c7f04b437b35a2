# ruff: noqa: E402, I001 - the path to the tests' small model stands before the imports
"""Everything at once, for a while: is an answer ever wrong, a request ever lost, does memory ever grow?

    python benchmarks/soak.py --seconds 600 [--replicas 2]

A small model in float32 behind the HTTP front on the loopback; clients that ask (greedily, so that every answer can be compared
with `generate` alone), leave in the middle, ask for what is not there, for adapters that are corrupt, for too much; an
operator who loads, unloads, pins and reloads; an adapter whose files change; with replicas, one that is killed now and
then. The outcome goes to benchmarks/results/soak.json, beside the last one of the other kind (in this process, on replicas).
It fails where an answer differs, where a request ends in anything but its answer or the error that it deserves, where
memory grows, or where anything is left when all have gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import openai
import torch
from trainers.machine import memory
from transformers import AutoModelForCausalLM

from api.conftest import Served, running
from api.small import Reference, write_adapters, write_base
from api.stub import bytes_tokenizer
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.http.front import Front
from lorakit.serve.engine.scheduler import Limits

RANKS = {"a": 2, "b": 3, "c": 4, "d": 8, "e": 16, "f": 4}
CHANGING = "f"
ANSWER = 16
WORKERS = 12
LIMITS: dict[str, Any] = {
    "batch": 8, "step_tokens": 64, "queue": 64, "cache_bytes": 2 << 20, "adapter_bytes": 300_000, "context": None,
}  # fmt: skip
GROWTH = 40e6
"""Bytes that the process may hold more in the last third than in the second: what allocators do, and no leak of a run."""


class Soak:
    """One run. `wrong` is what must stay empty, `seen` what happened how often."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self.base = write_base(folder / "base")
        self.store = write_adapters(self.base, folder / "store", RANKS)
        self.versions = [self._version(folder / f"v{number}", number) for number in range(2)]
        self.prompts = [[self.rng.randrange(50, 250) for _ in range(self.rng.randrange(3, 40))] for _ in range(8)]
        self.expected = self._expected()
        broken = self.store / "broken"
        shutil.copytree(self.store / "a", broken)
        (broken / "adapter_model.safetensors").write_bytes(b"not a tensor in it")
        self.tokenizer = bytes_tokenizer()

    def _version(self, folder: Path, seed: int) -> Path:
        """A file of tensors for the adapter whose files change; without lorakit.json, which belongs to one content alone."""
        torch.manual_seed(100 + seed)
        write_adapters(self.base, folder, {f"x{index}": 4 for index in range(seed)} | {CHANGING: 4})
        for own in (folder / CHANGING, self.store / CHANGING):
            (own / "lorakit.json").unlink(missing_ok=True)
        return folder / CHANGING / "adapter_model.safetensors"

    def _expected(self) -> dict[tuple[str, int], list[list[int]]]:
        """(model, prompt) -> the answers that are right; two where the files change."""
        found: dict[tuple[str, int], list[list[int]]] = {}
        for version in self.versions:
            shutil.copy(version, self.store / CHANGING / version.name)
            reference = Reference(self.base, self.store)
            for model in ["base", "blend", *RANKS]:
                route: Any = {"base": None, "blend": {"a": 0.6, "d": -0.4}}.get(model, model)
                for index, prompt in enumerate(self.prompts):
                    answer = reference(prompt, route, ANSWER)
                    answers = found.setdefault((model, index), [])
                    if answer not in answers:
                        answers.append(answer)
        return found

    # -- what clients and the operator do ----------------------------------------------------------------------------------
    async def ask(self, client: openai.AsyncOpenAI, leave: bool = False) -> None:
        """One greedy request, whose answer is compared; or one that is left in the middle."""
        model, index = self.rng.choice(list(self.expected))
        tokens = self.rng.randrange(1, ANSWER + 1)
        body: dict[str, Any] = {"ignore_eos": True, "logit_bias": {"0": -100}}
        if model == "blend":
            body["adapters"] = {"a": 0.6, "d": -0.4}
        options: dict[str, Any] = {
            "model": "base" if model == "blend" else model,
            "prompt": self.prompts[index],
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 0,
            "extra_body": body,
        }
        got: list[str] = []
        if leave or self.rng.random() < 0.5:
            async with await client.completions.create(stream=True, **options) as stream:
                while (chunk := await anext(stream, None)) is not None:
                    got += chunk.choices[0].logprobs.tokens if chunk.choices[0].logprobs else []
                    if leave:
                        self.seen["left"] += 1
                        return
        else:
            got = (await client.completions.create(**options)).choices[0].logprobs.tokens
        right = [[self.tokenizer.decode([one]) for one in answer[:tokens]] for answer in self.expected[model, index]]
        self.seen["answered"] += 1
        if got not in right:
            self.wrong.append(f"{model}, prompt {index}, {tokens} tokens: {got} instead of {right}")

    async def mistake(self, client: openai.AsyncOpenAI) -> None:
        """A request that has to be refused, with the status that it deserves."""
        options, status = self.rng.choice(
            [
                ({"model": "nobody", "prompt": "x"}, 404),
                ({"model": "../a", "prompt": "x"}, 404),
                ({"model": "broken", "prompt": "x"}, 400),
                ({"model": "a", "prompt": "x" * 400}, 400),
                ({"model": "a", "prompt": "x", "temperature": 9}, 400),
            ]
        )
        try:
            await client.completions.create(**options)  # type: ignore[call-overload]
            self.wrong.append(f"{options} was answered")
        except openai.APIStatusError as error:
            self.seen[f"refused {error.status_code}"] += 1
            if error.status_code not in (status, 429):
                self.wrong.append(f"{options} was answered with {error.status_code}: {error.message}")

    async def operate(self, admin: openai.AsyncOpenAI) -> None:
        """Move an adapter, or change its files."""
        if self.rng.random() < 0.3:
            fresh = self.store / CHANGING / ".fresh"
            shutil.copy(self.rng.choice(self.versions), fresh)
            os.replace(fresh, self.store / CHANGING / "adapter_model.safetensors")
            self.seen["changed"] += 1
            return
        verb = self.rng.choice(["load", "unload", "unload", "pin", "unpin", "unpin", "reload"])
        try:
            await admin.post(f"/adapters/{self.rng.choice(list(RANKS))}/{verb}", cast_to=object)
            self.seen[verb] += 1
        except openai.APIStatusError as error:  # no room beside what is pinned and in use
            self.seen[f"{verb} refused"] += 1
            if error.status_code not in (400, 429):
                self.wrong.append(f"{verb} was answered with {error.status_code}: {error.message}")

    async def worker(self, served: Served, until: float) -> None:
        """A client, and sometimes an operator, until the end."""
        client = served.aclient().with_options(max_retries=20, timeout=120)
        admin = client.with_options(base_url=served.url + "/admin", max_retries=0)
        strict = client.with_options(max_retries=0)
        async with client:
            while time.monotonic() < until:
                dice = self.rng.random()
                try:
                    if dice < 0.75:
                        await self.ask(client, leave=dice < 0.08)
                    elif dice < 0.87:
                        await self.mistake(strict)
                    else:
                        await self.operate(admin)
                except openai.APIStatusError as error:
                    # an adapter that is pinned out or changed at the very moment may be refused, with its reason
                    self.seen[f"error {error.status_code}"] += 1
                    if error.status_code not in (400, 429):
                        self.wrong.append(f"a good request was answered with {error.status_code}: {error.message}")
                except openai.APIError as error:
                    self.wrong.append(f"a request was lost: {type(error).__name__}: {error}")
                await asyncio.sleep(self.rng.expovariate(200))

    async def kill(self, engine: Any, until: float, every: float) -> None:
        """Kill a replica now and then."""
        while time.monotonic() + every < until:
            await asyncio.sleep(every)
            described = await asyncio.to_thread(lambda: engine._handle.describe.remote().result())
            os.kill(described["process"], signal.SIGKILL)
            self.seen["killed"] += 1

    async def run(self, served: Served, seconds: float, replicas: int) -> list[float]:
        """All of it; returns what the process held, over time."""
        until = time.monotonic() + seconds
        tasks = [asyncio.create_task(self.worker(served, until)) for _ in range(WORKERS)]
        if replicas:
            tasks.append(asyncio.create_task(self.kill(served.engine, until, max(10.0, seconds / 10))))
        held: list[float] = []
        while not all(task.done() for task in tasks):
            await asyncio.sleep(min(1.0, seconds / 30))
            held.append(memory())
        await asyncio.gather(*tasks)
        return held


def soak(seconds: float, replicas: int = 0, seed: int = 0) -> tuple[list[str], Counter[str], list[float]]:
    """Run; returns what went wrong, what happened, and the memory over time."""
    with tempfile.TemporaryDirectory(prefix="lorakit-soak-") as folder:
        run = Soak(Path(folder), seed)
        engine: Any
        if replicas:
            from lorakit.serve.remote.cluster import ClusterEngine

            engine = ClusterEngine(str(run.base), run.store, replicas, dtype="fp32", limits=LIMITS)
        else:
            model = AutoModelForCausalLM.from_pretrained(run.base).float().eval()
            engine = LocalEngine(model, run.store, Limits(**LIMITS))
        with running(Front(engine, run.tokenizer, name="tiny")) as served:
            held = asyncio.run(run.run(served, seconds, replicas))
            if not engine.drain(60):
                run.wrong.append("requests were left in the engine when every client had gone")
            stats = engine.stats()
            if stats.running or stats.waiting or stats.failure:
                run.wrong.append(f"what is left: {stats}")
            ledgers = served.front.tenants._ledgers.values()
            if any(ledger.running for ledger in ledgers):
                run.wrong.append("a quota still counts requests that have ended")
        third = len(held) // 3
        if third > 3:
            middle, last = sorted(held[third : 2 * third])[third // 2], sorted(held[-third:])[third // 2]
            if last - middle > GROWTH:
                run.wrong.append(f"memory grew from {middle / 1e6:.0f} to {last / 1e6:.0f} MB")
    return run.wrong, run.seen, held


def record(seconds: float, replicas: int, wrong: list[str], seen: Counter[str], held: list[float]) -> None:
    """Keep the outcome, and the table of all kinds for docs/benchmarks.md."""
    kinds: dict[str, Any] = json.loads(RESULTS.read_text())["kinds"] if RESULTS.exists() else {}
    kinds[f"{replicas} replicas on Ray" if replicas else "one process"] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "seconds": seconds,
        "seen": dict(sorted(seen.items())),
        "wrong": len(wrong),
        "memory": {"start": held[0], "most": max(held), "end": held[-1]},
    }
    RESULTS.write_text(json.dumps({"kinds": kinds, "markdown": markdown(kinds)}, indent=1) + "\n")


def markdown(kinds: dict[str, Any]) -> str:
    """The outcomes as a table."""
    rows = [
        "| | seconds | answers, all right | left in the middle | refused, as they deserve | moves and changes of adapters | "
        "replicas killed | memory at the start, at most, at the end | wrong or lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, kind in kinds.items():
        seen = kind["seen"]
        refused = sum(count for what, count in seen.items() if "refused" in what or what.startswith("error"))
        moved = sum(seen.get(verb, 0) for verb in ("load", "unload", "pin", "unpin", "reload", "changed"))
        memory = kind["memory"]
        rows.append(
            f"| {name}, {kind['date']} | {kind['seconds']:.0f} | {seen.get('answered', 0):,} | {seen.get('left', 0):,} | "
            f"{refused:,} | {moved:,} | {seen.get('killed', 0)} | "
            f"{', '.join(f'{memory[when] / 1e6:.0f}' for when in ('start', 'most', 'end'))} MB | {kind['wrong']} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run, print, and fail where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--replicas", type=int, default=0, help="serve from replicas on Ray, and kill one now and then")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    wrong, seen, held = soak(asked.seconds, asked.replicas, asked.seed)
    record(asked.seconds, asked.replicas, wrong, seen, held)
    print(json.dumps(dict(sorted(seen.items())), indent=2))
    print(
        f"memory: {held[0] / 1e6:.0f} MB at the start, {max(held) / 1e6:.0f} at most, {held[-1] / 1e6:.0f} at the end"
    )
    for one in wrong[:20]:
        print(f"WRONG: {one}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
