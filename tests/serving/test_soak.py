"""Everything at once for a while: random arrivals, loads, unloads, reloads, cancellations, deadlines, a corrupt adapter.

No wrong answer, no request without an end, no memory that stays. `LORAKIT_SOAK=600 pytest tests/serving/test_soak.py` runs ten
minutes.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.request import Refused, Ticket
from serving.small import Oracle, greedy, model, prompt, write_adapter

SECONDS = float(os.environ.get("LORAKIT_SOAK", "8"))
NAMES = ("r2", "r4", "r8", "dora")
BLENDS: list[dict[str, float]] = [{}, *({name: 1.0} for name in NAMES), {"r2": 0.5, "dora": 0.5}, {"broken": 1.0}]


def resident() -> int:
    """Resident memory of this process in bytes."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_soak(tmp_path: Path) -> None:
    base = model()
    methods = (lk.LoRA(rank=2), lk.LoRA(rank=4), lk.LoRA(rank=8), lk.DoRA(inner=lk.LoRA(rank=4)))
    for seed, (name, method) in enumerate(zip(NAMES, methods, strict=True)):
        write_adapter(base, tmp_path / name, method, seed=seed)
    shutil.copytree(tmp_path / "r2", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    oracle = Oracle(base, tmp_path)
    texts = [prompt(number, 5 + 3 * number) for number in range(10)]
    expected = {
        (index, number): oracle.answer(text, blend, 10)
        for index, blend in enumerate(BLENDS[:-1])
        for number, text in enumerate(texts)
    }
    size = sum((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in NAMES)
    limits = Limits(batch=6, step_tokens=32, cache_bytes=30 * 4096, adapter_bytes=int(0.7 * size), queue=20)
    engine = LocalEngine(base, tmp_path, limits)
    engine.start()
    end = time.monotonic() + SECONDS
    wrong: list[str] = []
    counts = dict.fromkeys(("right", "refused", "stopped"), 0)

    def client(seed: int) -> None:
        draw = random.Random(seed)
        number = 0
        while time.monotonic() < end and not wrong:
            number += 1
            index, text = draw.randrange(len(BLENDS)), draw.randrange(len(texts))
            deadline = draw.choice([None, None, None, 0.05])
            try:
                ticket: Ticket = engine.submit(
                    greedy(f"{seed}-{number}", texts[text], BLENDS[index], 10, deadline=deadline)
                )
                if draw.random() < 0.15:
                    time.sleep(draw.random() * 0.02)
                    ticket.cancel()
                found, last = ticket.tokens(60), ticket.result()[-1].finish
            except LorakitError as problem:
                counts["refused"] += 1
                if isinstance(problem, Refused) and BLENDS[index] != {"broken": 1.0}:
                    wrong.append(str(problem))
                continue
            except TimeoutError as problem:
                wrong.append(str(problem))
                continue
            answer = expected[index, text]
            if found != (answer if last == "length" else answer[: len(found)]):
                wrong.append(f"{BLENDS[index]}, prompt {text}: {found} instead of {answer}")
            counts["right" if last == "length" else "stopped"] += 1

    def operator() -> None:
        draw = random.Random(99)
        while time.monotonic() < end:
            name = draw.choice(NAMES)
            try:
                draw.choice([engine.adapters.load, engine.adapters.unload, engine.adapters.reload])(name)
            except Refused as problem:  # everything in use, which is an answer
                if "finds no room" not in problem.reason and "dropped as soon" not in problem.reason:
                    wrong.append(problem.reason)
            time.sleep(0.01)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(5)] + [threading.Thread(target=operator)]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS / 2)
    half = resident()
    for thread in threads:
        thread.join()
    assert engine.drain(60)
    grown = resident() - half
    stats = engine.stats()
    engine.stop()
    assert not wrong
    assert counts["right"] > 10
    assert counts["refused"]
    assert stats.running == stats.waiting == stats.cache_bytes == 0
    assert not any(info.using for info in engine.adapters.all())
    assert stats.adapter_bytes <= stats.adapter_limit
    assert grown < 32 * 2**20, f"{grown} bytes more after the second half"
