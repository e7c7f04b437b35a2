"""Training the experts of a mixture, side by side: lorakit, and PEFT with `target_parameters`.

    make bench-expert-training                                          some four minutes on two quiet cores
    make bench-expert-training BENCH_OPTIONS="--rounds 5"          steadier

Models have the form of Qwen3-MoE and of gpt-oss and random weights. Each measurement is a process of its own, and the
sides take turns at being first. Both train LoRA of one rank on both projections of all experts, and nothing else, with
the same base weights, tokens and optimiser; the first loss, before anything is trained, must be the same. A step is
forward, backward and AdamW; the first of each process is not counted. Memory is by how much the process grew at its
peak above the base model: adapter, gradients, moments and activations. Results go to benchmarks/results/expert_training.json;
the exit status is 1 where a floor is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from trainers.machine import describe, forget_peak, gemm_peak, memory, others_share, wait_until_quiet

RESULTS = Path(__file__).resolve().parent / "results" / "expert_training.json"
LIBRARIES = ("lorakit", "torch", "transformers", "peft")
SIDES = ("lorakit", "peft")
FASTER, SMALLER = 3.0, 0.5
"""Floors: at least so many times as fast, at most so much of the memory."""
RANK, ROWS, LENGTH, VOCABULARY = 16, 4, 64, 2048
SHAPES: dict[str, dict[str, int]] = {
    "qwen3-moe": {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8},
    "gpt-oss": {"hidden_size": 768, "intermediate_size": 768, "num_local_experts": 32, "num_experts_per_tok": 4},
}
LAYERS = 3
DTYPES = ("float32", "bfloat16")
LARGE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
}
"""Qwen3-30B-A3B, for the time that attaching takes."""


def base_model(name: str, dtype: str) -> Any:
    """A random model, the same at every call."""
    import torch
    import transformers as T

    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"head_dim": 64, "vocab_size": VOCABULARY, **SHAPES[name]}
    torch.manual_seed(0)
    if name == "qwen3-moe":
        return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**sizes)).to(getattr(torch, dtype)).train()
    return T.GptOssForCausalLM(T.GptOssConfig(**sizes)).to(getattr(torch, dtype)).train()


def adapted(model: Any, side: str) -> Any:
    """The model with LoRA on its experts."""
    if side == "lorakit":
        import lorakit as lk

        lk.attach(model, lk.LoRA(rank=RANK, alpha=RANK), target_modules=["experts"])
        return model
    import peft

    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=parameters)
    return peft.get_peft_model(model, config)


def measure(name: str, dtype: str, side: str, steps: int) -> dict[str, Any]:
    """Some steps of one side, in this process."""
    import peft  # noqa: F401  what libraries lay out when they are imported is no part of a training
    import torch

    import lorakit as lk

    _ = lk.LoRA, lk.attach
    peak = gemm_peak(dtype, rounds=4)
    model = base_model(name, dtype)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, VOCABULARY, (steps + 1, ROWS, LENGTH), generator=generator)
    forget_peak()
    before, begin = memory(), time.perf_counter()
    model = adapted(model, side)
    attached = time.perf_counter() - begin
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    seconds, losses = [], []
    for ids in batches:
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    grew = memory("VmHWM") - before
    numbers = sum(parameter.numel() for parameter in trained)
    return {
        "seconds": seconds[1:],
        "losses": losses,
        "grew": grew,
        "attach": attached,
        "numbers": numbers,
        "peak": peak,
    }


def attach_large() -> dict[str, Any]:
    """Seconds to attach to every expert of a model of 128 experts in 48 layers, on the meta device."""
    import torch
    import transformers as T

    import lorakit as lk

    with torch.device("meta"):
        model = T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**LARGE))
    method = lk.LoRA(rank=RANK)
    begin = time.perf_counter()
    adapter = lk.attach(model, method, target_modules=["experts"])
    return {"seconds": time.perf_counter() - begin, "matrices": sum(1 for _ in adapter.deltas())}


def apart(asked: argparse.Namespace, *what: str) -> dict[str, Any]:
    """A measurement in a process of its own, with the share of the cores that others took before."""
    share = wait_until_quiet(0.05, asked.patience, print) if asked.patience else others_share(0.5)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "side.json"
        command = [sys.executable, "-W", "ignore", __file__, "--steps", str(asked.steps), "--output", str(result)]
        subprocess.run([*command, "--side", *what], check=True)
        found: dict[str, Any] = json.loads(result.read_text())
    return {**found, "others_share": share}


def judged(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The lines of the table, a model in one dtype each, and what was missed."""
    lines, missed = [], []
    for name, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = {
            side: sorted(
                (row for row in rows if (row["model"], row["dtype"], row["side"]) == (name, dtype, side)),
                key=lambda row: int(row["round"]),
            )
            for side in SIDES
        }
        first = {side: held[0]["losses"][0] for side, held in own.items()}
        if abs(first["lorakit"] - first["peft"]) > 0.01 * abs(first["peft"]):
            missed.append(f"{name} {dtype}: the sides do not start from the same loss: {first}")
        step = {side: [median(row["seconds"]) for row in held] for side, held in own.items()}
        grew = {side: [row["grew"] for row in held] for side, held in own.items()}
        faster = [theirs / ours for ours, theirs in zip(step["lorakit"], step["peft"], strict=True)]
        share = [ours / theirs for ours, theirs in zip(grew["lorakit"], grew["peft"], strict=True)]
        if median(faster) < FASTER:
            missed.append(f"{name} {dtype}: {median(faster):.2f} times as fast, the floor is {FASTER}")
        if median(share) > SMALLER:
            missed.append(f"{name} {dtype}: {median(share):.2f} of the memory, the floor is {SMALLER}")
        cells = [
            name, dtype, *(f"{median(step[side]):.2f} s" for side in SIDES), spread(faster, "×"),
            *(f"{median(grew[side]) / 1e6:,.0f} MB" for side in SIDES), spread(share, "×"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines, missed


def spread(values: list[float], unit: str) -> str:
    """The median with the range behind it."""
    return f"{median(values):.2f}{unit} ({min(values):.2f}{unit} to {max(values):.2f}{unit})"


def text_of(rows: list[dict[str, Any]], large: dict[str, Any], machine: dict[str, Any], lines: list[str]) -> str:
    """What docs/benchmarks.md shows."""
    busy = [row for row in rows if (row["others_share"] or 0) > 0.05]
    peaks = {dtype: median(row["peak"] for row in rows if row["dtype"] == dtype) / 1e9 for dtype in DTYPES}
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return "\n".join(
        [
            f"{datetime.now(UTC).date()}, {machine['processor']}, {machine['cores']} cores. {libraries}. GEMM peak (2048³): "
            + ", ".join(f"{dtype} {peak:,.0f} GFLOP/s" for dtype, peak in peaks.items())
            + f". {len(busy)} of {len(rows)} processes began while others took over 5% of the cores.",
            "",
            f"LoRA of rank {RANK} on all experts and nothing else, {LAYERS} layers, {ROWS} × {LENGTH} tokens a step. "
            "Qwen3-MoE: 64 experts, hidden size 1,024, 512 between, 8 experts a token. gpt-oss: 32 experts, 768, 768, 4. "
            f"Medians, with the range over rounds. Floors: {FASTER:g} times as fast, {SMALLER:g} of the memory.",
            "",
            "| model | dtype | step, lorakit | step, PEFT | times as fast | memory, lorakit | memory, PEFT | share |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"Attaching to every expert of Qwen3-30B-A3B (48 layers of 128 experts, {large['matrices']:,} matrices, on the "
            f"meta device): {large['seconds']:.1f} s.",
        ]
    )


def main() -> int:
    """Measure, compare, write; 1 where a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine before each")
    parser.add_argument("--side", nargs="+")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.side:
        found = attach_large() if asked.side == ["attach"] else measure(*asked.side, asked.steps)
        asked.output.write_text(json.dumps(found))
        return 0
    rows = []
    for number in range(asked.rounds):
        for name in SHAPES:
            for dtype in DTYPES:
                for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                    row = {"model": name, "dtype": dtype, "side": side, "round": number}
                    rows.append({**row, **apart(asked, name, dtype, side)})
                    said = rows[-1]
                    print(
                        f"{name} {dtype} {side}: {median(said['seconds']):.2f} s, {said['grew'] / 1e6:,.0f} MB",
                        flush=True,
                    )
    large = apart(asked, "attach")
    lines, missed = judged(rows)
    machine = describe()
    text = text_of(rows, large, machine, lines)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": "experts",
        "machine": machine,
        "rows": rows,
        "attach": large,
        "missed": missed,
        "markdown": text,
    }
    asked.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(text)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
