"""Changing adapters on a live model: choosing among a hundred that are loaded, and putting another's numbers in place.

    make bench-swap

The model has the sizes of SmolLM2-135M and random weights (210 linear layers). What is counted is processor time, so that other
work on the machine does not matter: the median of many calls, with the fastest and the slowest. Results go to
benchmarks/results/swap.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

import lorakit as lk
import material

RESULTS = Path(__file__).resolve().parent / "results" / "swap.json"
COUNT, SLOT = 100, 32


def model() -> transformers.LlamaForCausalLM:
    """SmolLM2-135M's sizes, but for the vocabulary, which no adapter sees."""
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=128,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def timed(call: Callable[[int], object], times: int) -> list[float]:
    """Milliseconds of processor time of each call."""
    found = []
    for index in range(times):
        start = time.process_time()
        call(index)
        found.append(1e3 * (time.process_time() - start))
    return found


def told(found: list[float]) -> str:
    """Median, and the ends."""
    return f"{statistics.median(found):.3g} ms ({min(found):.3g} to {max(found):.3g})"


def main() -> None:
    """Measure, print, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base = model()
    names = [f"a{index}" for index in range(COUNT)]
    for name in names:
        lk.attach(base, lk.LoRA(rank=1), name=name)
    switch = timed(lambda index: lk.activate(base, names[(37 * index) % COUNT]), 1000)
    lk.detach(base)
    slot = lk.attach(base, lk.LoRA(rank=SLOT), name="slot")
    others = [lk.attach(base, lk.LoRA(rank=rank), name=f"r{rank}") for rank in (8, 16)]
    swap = timed(lambda index: lk.swap(slot, others[index % 2]), 12)
    rows = {
        f"activate one of {COUNT} loaded adapters": told(switch),
        f"swap an adapter of rank 8 or 16 into a slot of rank {SLOT}": told(swap),
    }
    lines = ["| 210 linear layers | processor time, median (least to most) |", "|---|---|"]
    lines += [f"| {what} | {found} |" for what, found in rows.items()]
    said = f"{datetime.now(UTC):%Y-%m-%d}, one thread, lorakit {version('lorakit')}, torch {version('torch')}."
    record = {"rows": rows, "markdown": "\n".join([said, "", *lines])}
    material.write_whole(RESULTS, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(record["markdown"])


if __name__ == "__main__":
    main()
