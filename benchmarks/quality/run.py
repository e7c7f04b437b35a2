"""One method over all seeds, in a process of its own: `python -m quality.run JOB.json RESULT.json`.

Each run is `lorakit.train.train`, as the command line has it. Seconds are the processor's, of one thread, so that what else the
machine does matters little.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
from lorakit.models.loading import load_model
from lorakit.train import TrainConfig, load_config, train
from lorakit.train.data.reading import load_splits
from lorakit.train.run import TrainResult, evaluation_set, examine, path_for
from trainers import machine

HALF = ("LoRA", "DyLoRA")
"""Rows that are also measured at half their rank: DyLoRA as it was trained to be cut, LoRA by its singular values."""


def main(job_path: Path, result_path: Path) -> None:
    """Train every seed and write what was measured; without a seed the base is measured as it is."""
    job = json.loads(job_path.read_text())
    setting = job["setting"]
    # The first load of a process reads libraries and lays memory out; it is no part of any run.
    load_model(job["model"])
    runs = [] if job["seeds"] else [untrained(job)]
    for seed in job["seeds"]:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one(job, setting, seed, Path(folder) / "adapter"))
    row = {"name": setting["name"], "learning_rate": setting["learning_rate"], "note": setting["note"], "runs": runs}
    draft = result_path.with_suffix(".draft")
    draft.write_text(json.dumps(row))
    draft.replace(result_path)


def configuration(job: dict[str, Any], setting: dict[str, Any], seed: int, output: Path) -> TrainConfig:
    """What `lorakit train` would be told for one run."""
    held_limit = min(job["held_out"], 500)
    return load_config(
        None,
        [
            f"model={job['model']}",
            f"data.train={job['reviews']}/train.jsonl",
            f"data.evaluation={job['reviews']}/held_out.jsonl",
            f"data.evaluation_limit={held_limit}",
            f"data.shuffle_seed={seed}",
            "data.max_length=256",
            f"train.output={output}",
            f"train.max_steps={job['steps']}",
            f"train.batch_size={job['batch_size']}",
            f"train.learning_rate={setting['learning_rate']}",
            f"train.seed={seed}",
            "train.logging_steps=1",
            "evaluate.answers=score",
            "evaluate.choices=[positive, negative]",
            "evaluate.before_and_after=false",
            *setting["flags"],
        ],
    )


def untrained(job: dict[str, Any]) -> dict[str, Any]:
    """The base without an adapter on the same held-out rows, by the same evaluation."""
    config = configuration({**job, "steps": 1}, job["setting"], 0, Path("nothing is written"))
    model, tokenizer = load_model(config.model, dtype=config.train.precision)
    _, rows = load_splits(config.data)
    assert rows is not None
    with torch.no_grad():
        found = examine(model, tokenizer, evaluation_set(rows, tokenizer, config), config, path_for(config, model))
    return {"accuracy": found.accuracy, "loss": found.loss}


def one(job: dict[str, Any], setting: dict[str, Any], seed: int, output: Path) -> dict[str, Any]:
    """One run with one seed, which decides initial values, dropout and which rows are seen in which order."""
    config = configuration(job, setting, seed, output)
    machine.forget_peak()
    begin, processor = time.perf_counter(), time.process_time()
    done = train(config)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    peak = machine.memory("VmHWM")
    after = done.after
    assert after is not None  # rows were held out
    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    found: dict[str, Any] = {
        "seed": seed,
        "accuracy": after.accuracy,
        "loss": after.loss,
        "losses": losses,
        "trained": done.adapter.num_parameters(trainable=True),
        "processor_seconds": processor,
        "seconds": seconds,
        "memory_peak": peak,
        "file_bytes": (done.folder / "adapter_model.safetensors").stat().st_size,
        "ranks": ranks(done),
    }
    if setting["name"] in HALF:
        found["half"] = at_half(done, config)
    return found


def ranks(done: TrainResult) -> list[int]:
    """The rank that every layer has at the end, for methods whose ranks change."""
    if done.adapter.method.name not in ("adalora", "elalora"):
        return []
    counts = []
    for _, _, delta in done.adapter.deltas():
        low = delta.low_rank()
        if low is not None:
            gate = low.gate()
            B, _ = low.factors()
            counts.append(B.shape[1] if gate is None else int((gate != 0).sum()))
    return counts


def at_half(done: TrainResult, config: Any) -> float:
    """Accuracy at half the rank."""
    method: Any = done.adapter.method
    own = method.name == "dylora"
    lk.resize(done.adapter, rank=method.rank // 2, own=own, name="half")
    _, held_rows = load_splits(config.data)
    assert held_rows is not None
    held = evaluation_set(held_rows, done.tokenizer, config)
    with torch.no_grad(), lk.use(done.model, "half"):
        accuracy = examine(done.model, done.tokenizer, held, config, path_for(config, done.model)).accuracy
    assert accuracy is not None
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
