"""Memory of training, measured and predicted side by side: full, GaLore, LoRA, QLoRA, one step of each in a process of its own.

    make bench-memory            the table, benchmarks/results/memory.json; fails where a prediction is off by more than 10%

Base and adapter are bytes of the tensors that the loaded model holds. The rest is what the system says: by how much the
resident memory of the process is larger while one forward pass waits for its backward (activations), behind the backward
pass (gradients), and behind the optimiser's step. For that the allocator is told to map every larger tensor by itself and to
give it back at once, and one pass and one step for a few stand-ins are made before, so that libraries have laid out what is
theirs. Beside them stands by how much the process grew at its peak in that step, which has what lives for a moment in it, and
is not judged.
Predicted is what `lorakit plan` says from shapes alone. Below that, the same arithmetic for models that do not fit here.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import material
from lorakit.insight.plan import WAYS, Plan, gigabytes, plan
from lorakit.methods import LoRA
from trainers.machine import describe, forget_peak, memory

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
ALLOWED = 0.10
"""How far a prediction may be off, of what was measured."""
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
"""glibc's: tensors from 64 kB on lie in mappings of their own, and go back to the system when they are freed."""
SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Shapes of Llama, 32,000 tokens."""


def measure(way: str, batch: int, length: int, rank: int, galore_rank: int) -> dict[str, Any]:
    """One step of one way on the real model, in this process."""
    import lorakit as lk
    from lorakit.models.loading import load_model
    from lorakit.models.quantisation import holding
    from lorakit.optim import build_optimizer

    model, _ = load_model(material.fetch_model(), dtype="bf16", quantize="nf4" if way == "qlora" else None)
    base = holding(model).nbytes
    for tensor in model.state_dict().values():
        tensor.sum()  # weights are mapped from their file: rows of the embedding that no token asked for are not there yet
    model.train()
    adapter = 0
    if way in ("lora", "qlora"):
        trained = list(lk.attach(model, LoRA(rank=rank)).parameters())
        adapter = sum(p.numel() * p.element_size() for p in trained)
    else:
        model.requires_grad_(True)
        trained = list(model.parameters())
    name, options = ("galore", {"rank": galore_rank}) if way == "galore" else ("adamw", {})
    optimiser = build_optimizer(name, [{"params": trained, "lr": 1e-4}], **options)
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    body = model.get_decoder()

    def forward() -> torch.Tensor:
        states: torch.Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
        return states

    forward().float().square().mean().backward()  # what libraries lay out at a first step is theirs
    for parameter in trained:
        parameter.grad = None
    warm_up(name, options, trained)
    forget_peak()
    before = resident()
    started = time.perf_counter()
    states = forward()
    activations = resident() - before
    states.float().square().mean().backward()
    del states
    gradients = resident() - before
    optimiser.step()
    held = resident() - before - gradients
    seconds = time.perf_counter() - started
    parts = {
        "base": base,
        "adapter": adapter,
        "gradients": gradients,
        "optimiser": held,
        "activations": activations,
    }
    parts["total"] = sum(parts.values())
    return {"parts": parts, "grew": memory("VmHWM") - before, "seconds": seconds, "config": model.config.to_dict()}


def warm_up(name: str, options: dict[str, Any], trained: list[Tensor]) -> None:
    """A step of the same optimiser for a stand-in of every shape: kernels made for a shape at its first step, and scratch that
    an SVD's library keeps for the next, are no state of the optimiser."""
    from lorakit.optim import build_optimizer

    stand_ins = [torch.nn.Parameter(torch.zeros_like(one)) for one in {one.shape: one for one in trained}.values()]
    for one in stand_ins:
        one.grad = torch.randn_like(one)
    build_optimizer(name, [{"params": stand_ins, "lr": 1e-4}], **options).step()


def resident() -> int:
    """Bytes of memory that this process holds, without what nobody refers to any more and without free pages of the heap."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    return int(memory("VmRSS"))


def apart(way: str, asked: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "side.json"
        command = [sys.executable, __file__, "--side", way, "--output", str(result)]
        command += ["--batch", str(asked.batch), "--length", str(asked.length), "--rank", str(asked.rank)]
        subprocess.run([*command, "--galore-rank", str(asked.galore_rank)], check=True, env={**os.environ, **ALLOCATOR})
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def rows_of(sides: dict[str, dict[str, Any]], plans: dict[str, Plan]) -> tuple[list[str], list[str]]:
    """The lines of the table, and what was missed."""
    lines, missed = [], []
    for way, side in sides.items():
        said = plans[way].parts()
        for part, found in side["parts"].items():
            if not found and not said[part]:
                continue
            off = said[part] / found - 1 if found else float("inf")
            word = "" if abs(off) <= ALLOWED else "**off**"
            if word:
                missed.append(f"{way}, {part}: predicted {gigabytes(said[part])}, measured {gigabytes(found)}")
            grew = gigabytes(int(side["grew"])) if part == "total" else ""
            first = way if part == "base" else ""
            cells = (first, part, gigabytes(found), gigabytes(said[part]), f"{off:+.1%}", grew, word)
            lines.append(f"| {' | '.join(cells)} |")
    return lines, missed


def larger(asked: argparse.Namespace) -> list[str]:
    """The arithmetic for models that do not fit here."""
    from transformers import LlamaConfig

    lines = []
    for name, sizes in SIZES.items():
        config = LlamaConfig(vocab_size=32000, **sizes)
        for way in WAYS:
            found = plan(
                config, way, method=LoRA(rank=64), length=512, recompute=True, rank=1024, moments=torch.float32
            )
            cells = " | ".join(gigabytes(count) if count else "" for count in found.parts().values())
            lines.append(f"| {name if way == 'full' else ''} | {way} | {cells} |")
    return lines


def main() -> int:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--galore-rank", type=int, default=128)
    parser.add_argument("--side", choices=WAYS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.side:
        found = measure(asked.side, asked.batch, asked.length, asked.rank, asked.galore_rank)
        asked.output.write_text(json.dumps(found, default=str))
        return 0
    from transformers import LlamaConfig

    sides = {way: apart(way, asked) for way in WAYS}
    config = LlamaConfig(**{k: v for k, v in sides["full"].pop("config").items() if k not in ("model_type", "dtype")})
    options: dict[str, Any] = {"batch": asked.batch, "length": asked.length, "rank": asked.galore_rank}
    plans = {way: plan(config, way, method=LoRA(rank=asked.rank), **options) for way in WAYS}
    lines, missed = rows_of(sides, plans)
    machine = describe()
    text = "\n".join(
        [
            f"SmolLM2-135M in bfloat16, {asked.batch} × {asked.length} tokens, LoRA of rank {asked.rank} on all linear layers, "
            f"GaLore of rank {asked.galore_rank}, the base of QLoRA in NF4 with double quantisation. Allowed: {ALLOWED:.0%}.",
            "",
            "| | | measured | predicted | off by | the process grew in the step by | |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
            "The same arithmetic for Llama's sizes: batch 1, 512 tokens, blocks recomputed, moments in float32, LoRA of "
            "rank 64, GaLore of rank 1,024.",
            "",
            "| | | base | adapter | gradients | optimiser | activations | total |",
            "|---|---|---|---|---|---|---|---|",
            *larger(asked),
        ]
    )
    for side in sides.values():
        side.pop("config", None)
    asked.output.parent.mkdir(exist_ok=True)
    record = {"machine": machine, "sides": sides, "predicted": {way: one.parts() for way, one in plans.items()}}
    asked.output.write_text(json.dumps({**record, "markdown": text}, indent=1, ensure_ascii=False, default=str) + "\n")
    print(text)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
