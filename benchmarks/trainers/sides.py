"""The sides of the training benchmark, each run as a process of its own: `python -m trainers.sides JOB.json`.

A job is a JSON file: which side, which rows, how many steps, where the result goes. All sides get the same token ids in
the same order, start from the same adapter weights, and are read by one `Clock`, a callback that every Hugging Face
Trainer calls. The sides:

- `lorakit`: `lorakit.train.run.train`, what `lorakit train` runs, with nothing changed in it;
- `trl`: TRL's SFTTrainer with PEFT's LoRA;
- `loop`: the loop that one writes by hand around a PEFT model: padded batches, logits only where labels are;
- `trainer`: Hugging Face's Trainer with PEFT's LoRA, for the sentence classifier.

Besides: `start` writes the adapter that all sides start from, `score` measures finished adapters on held-out rows,
`attach` times attaching and switching.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from trainers.machine import forget_peak, gemm_peak, memory

Job = dict[str, Any]


class Clock(transformers.TrainerCallback):
    """When each step ended, what it was fed, its loss, and the memory at the peak of training."""

    def __init__(self) -> None:
        self.begin = 0.0
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.batches: list[list[Any]] = []
        self.before = self.peak = 0.0
        self.norm = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Listen to the loader, note what training starts from, and start."""
        loader = known.get("train_dataloader")
        if loader is not None:
            loader = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper has another one inside
            loader.collate_fn = self.listening(loader.collate_fn)
        self.start(known["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """A step, with whatever its trainer did between the last one and this."""
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **known: Any) -> None:
        """Every trainer logs its loss at every step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """The peak is read before anything is evaluated."""
        self.stop()

    def start(self, model: torch.nn.Module) -> None:
        """Note the start weights and memory."""
        trained = [p.detach().double() for p in model.parameters() if p.requires_grad]
        self.norm = float(sum(p.square().sum() for p in trained)) ** 0.5
        self.before = memory()
        forget_peak()
        self.begin = time.perf_counter()

    def stop(self) -> None:
        """Read the peak."""
        self.peak = memory("VmHWM")

    def listening(self, collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """A collator that notes the rows that pass."""

        def noted(rows: list[Any]) -> Any:
            self.batches.append(list(rows))
            return collate(rows)

        return noted

    def result(self) -> dict[str, Any]:
        """What was noted, in seconds and bytes."""
        steps = len(self.ends)
        edges = [self.begin, *self.ends]
        return {
            "seconds": [round(end - begin, 5) for begin, end in itertools.pairwise(edges)],
            "losses": self.losses[:steps],
            "tokens": [sum(len(tokens_of(row)) for row in rows) for rows in self.batches[:steps]],
            "digests": [digest(rows) for rows in self.batches[:steps]],
            "memory_before": self.before,
            "memory_peak": self.peak,
            "start_norm": self.norm,
        }


def tokens_of(row: Any) -> list[int]:
    """The token ids of a row, whichever trainer it was made for."""
    return list(row["input_ids"] if isinstance(row, dict) else row.input_ids)


def digest(rows: list[Any]) -> str:
    """A batch in a few letters: two sides with equal ones were fed the same tokens."""
    return hashlib.sha256(repr([tokens_of(row) for row in rows]).encode()).hexdigest()[:16]


def main(path: str) -> None:
    """Do the job of a file and write its result."""
    job: Job = json.loads(Path(path).read_text())
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    result = DOERS[job["side"]](job)
    result["threads"] = torch.get_num_threads()
    Path(job["result"]).write_text(json.dumps(result))


# -- what all sides have in common -----------------------------------------------------------------


def configuration(job: Job) -> Any:
    """The run as lorakit's configuration; the other sides read their data and numbers from it."""
    import lorakit as lk
    from lorakit.train.config.run import DataOptions, EvaluateOptions, TrainConfig, TrainOptions

    lora = lk.LoRA(rank=job["rank"], alpha=job["alpha"])
    return TrainConfig(
        model=job["model"],
        method=lk.DoRA(inner=lora) if job.get("method") == "dora" else lora,
        target_modules="all-linear",
        data=DataOptions(train=job["rows"], shuffle_seed=None, **job.get("data", {})),
        train=TrainOptions(
            output=job["output"],
            max_steps=job["steps"],
            batch_size=job["batch_size"],
            learning_rate=job["learning_rate"],
            scheduler="linear",
            warmup=0,
            precision=job["precision"],
            seed=job["seed"],
            logging_steps=1,
        ),
        evaluate=EvaluateOptions(before_and_after=False),
        **({"task": job["task"]} if "task" in job else {}),
    )


def examples_of(config: Any, tokenizer: Any) -> list[Any]:
    """The tokenised rows, the same on every side."""
    from lorakit.train.data.examples import prepare
    from lorakit.train.data.reading import load_splits

    return prepare(load_splits(config.data)[0], tokenizer, config.data).examples


def peft_configuration(job: Job, **options: Any) -> Any:
    """PEFT's words for the same adapter."""
    import peft

    return peft.LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=job.get("dropout", 0.0),
        target_modules="all-linear",
        **options,
    )


def take_start(model: Any, folder: str) -> None:
    """Give a PEFT model the weights that all sides start from."""
    import peft

    outcome = peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder, device="cpu"))
    if outcome.unexpected_keys:
        raise SystemExit(f"start: PEFT knows no {outcome.unexpected_keys[:3]}")


def trainer_arguments(job: Job) -> dict[str, Any]:
    """The numbers of the run as Hugging Face's TrainingArguments name them, as lorakit's run sets them."""
    return {
        "output_dir": job["output"] + "-checkpoints",
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": job["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def with_clock() -> Clock:
    """A clock that every Trainer made from now on calls."""
    clock = Clock()
    transformers.trainer.DEFAULT_CALLBACKS.append(clock)
    return clock


# -- the sides -------------------------------------------------------------------------------------


def run_lorakit(job: Job) -> dict[str, Any]:
    """The real run path, from the configuration to the adapter's folder."""
    peak = gemm_peak()
    clock = with_clock()
    from lorakit.train import train
    from lorakit.train.step.packing import pack

    begin = time.perf_counter()
    result = train(configuration(job))
    told = {"gemm_peak": peak, "whole_run": time.perf_counter() - begin, "path": result.record.path, **clock.result()}
    if "task" not in job:
        packed = [pack(rows) for rows in clock.batches[: len(clock.ends)]]
        linear, adapter, head = sizes(result.model)
        told["computed"] = [one.tokens for one in packed]
        told["flops"] = [one.tokens * (4 * linear + 6 * adapter) + len(one.targets) * 4 * head for one in packed]
    return told


def run_trl(job: Job) -> dict[str, Any]:
    """SFTTrainer on the same tokens and labels, which it takes as they are."""
    peak = gemm_peak()
    clock = with_clock()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lorakit.models.loading import load_model

    config = configuration(job)
    model, tokenizer = load_model(job["model"], dtype=job["precision"])
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in examples_of(config, tokenizer)]
    arguments = SFTConfig(**trainer_arguments(job), max_length=None, **job.get("sft", {}))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_configuration(job, task_type="CAUSAL_LM"),
    )
    take_start(trainer.model, job["start"])
    trainer.train()
    trainer.model.save_pretrained(job["output"])
    linear, adapter, head = sizes(trainer.model.get_base_model())
    again = 2 * linear if arguments.gradient_checkpointing else 0
    computed = [padded(rows) for rows in clock.batches[: len(clock.ends)]]
    # Off Triton, TRL scores every position, and its backward pass makes the logits again.
    flops = [
        rows * longest * (4 * linear + again + 6 * adapter) + rows * (longest - 1) * 6 * head
        for rows, longest in computed
    ]
    return {
        "gemm_peak": peak,
        "computed": [rows * longest for rows, longest in computed],
        "flops": flops,
        **clock.result(),
    }


def run_loop(job: Job) -> dict[str, Any]:
    """The loop written by hand around a PEFT model: pads to the longest row, and asks for logits only where a label
    is."""
    peak = gemm_peak()
    import peft

    from lorakit.models.loading import load_model

    config = configuration(job)
    model, tokenizer = load_model(job["model"], dtype=job["precision"])
    examples = examples_of(config, tokenizer)
    transformers.set_seed(job["seed"])
    model = peft.get_peft_model(model, peft_configuration(job, task_type="CAUSAL_LM"))
    take_start(model, job["start"])
    causal = model.get_base_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / job["steps"]))
    # The Trainer's order: its sampler draws one permutation from a generator with the run's seed.
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(job["seed"])).tolist()
    clock = Clock()
    model.train()
    labelled = []
    clock.start(model)
    for step in range(job["steps"]):
        batch = [examples[i] for i in order[step * job["batch_size"] : (step + 1) * job["batch_size"]]]
        clock.batches.append(batch)
        ids, mask, labels = pad(batch, tokenizer.pad_token_id)
        hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        chosen = labels[:, 1:] != -100
        logits = causal.lm_head(hidden[chosen])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.losses.append(loss.item())
        labelled.append(len(logits))
        clock.ends.append(time.perf_counter())
    clock.stop()
    model.save_pretrained(job["output"])
    linear, adapter, head = sizes(causal)
    computed = [padded(rows) for rows in clock.batches]
    flops = [
        rows * longest * (4 * linear + 6 * adapter) + count * 4 * head
        for (rows, longest), count in zip(computed, labelled, strict=True)
    ]
    return {
        "gemm_peak": peak,
        "computed": [rows * longest for rows, longest in computed],
        "flops": flops,
        **clock.result(),
    }


def run_trainer(job: Job) -> dict[str, Any]:
    """Hugging Face's Trainer with PEFT on the sentence classifier."""
    peak = gemm_peak()
    clock = with_clock()
    import peft

    from lorakit.models.loading import load_model
    from lorakit.train.data.classification import prepare_labels
    from lorakit.train.data.reading import load_splits

    config = configuration(job)
    transformers.set_seed(job["seed"])
    model, tokenizer = load_model(job["model"], dtype=job["precision"], task="seq-cls", num_labels=2)
    prepared = prepare_labels(load_splits(config.data)[0], tokenizer, config.data)
    rows = [{"input_ids": one.input_ids, "labels": one.label} for one in prepared.examples]
    model = peft.get_peft_model(model, peft_configuration(job, task_type="SEQ_CLS"))
    take_start(model, job["start"])
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**trainer_arguments(job)),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    model.save_pretrained(job["output"])
    computed = [rows * longest for rows, longest in map(padded, clock.batches[: len(clock.ends)])]
    return {"gemm_peak": peak, "computed": computed, **clock.result()}


def pad(batch: Sequence[Any], filler: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as tensors as wide as the longest: ids, mask, labels."""
    longest = max(len(one.input_ids) for one in batch)
    short = [longest - len(one.input_ids) for one in batch]
    ids = torch.tensor([one.input_ids + [filler] * n for one, n in zip(batch, short, strict=True)])
    mask = torch.tensor([[1] * len(one.input_ids) + [0] * n for one, n in zip(batch, short, strict=True)])
    labels = torch.tensor([one.labels + [-100] * n for one, n in zip(batch, short, strict=True)])
    return ids, mask, labels


def padded(rows: Sequence[Any]) -> tuple[int, int]:
    """The shape of a padded batch."""
    return len(rows), max(len(tokens_of(row)) for row in rows)


def sizes(model: Any) -> tuple[int, int, int]:
    """Numbers in the frozen linear layers of the blocks, in what is trained, and in the head."""
    parameters = dict(model.named_parameters())
    head = model.get_output_embeddings().weight.numel()
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    linear = sum(
        p.numel()
        for name, p in parameters.items()
        if p.ndim == 2 and not p.requires_grad and "embed" not in name and "lm_head" not in name
    )
    return linear, trained, head


# -- besides ---------------------------------------------------------------------------------------


def write_start(job: Job) -> dict[str, Any]:
    """The adapter as lorakit's run makes it at its start, for the others to start from."""
    import lorakit as lk
    from lorakit.models.loading import load_model

    config = configuration(job)
    options: dict[str, Any] = {}
    if "task" in job:
        transformers.set_seed(job["seed"])
        options = {"task": job["task"], "num_labels": 2}
    model, _ = load_model(job["model"], dtype=job["precision"], **options)
    arguments = config.attach_arguments()
    if "task" in job:
        arguments["modules_to_save"] = ["classifier"]
    transformers.set_seed(job["seed"])
    lk.attach(model, config.method, **arguments).save(job["output"])
    return {}


def write_newspaper(job: Job) -> dict[str, Any]:
    """Rows of 1,024 to 2,048 tokens, cut one after another from all articles in their order."""
    import random

    import material
    from lorakit.models.loading import load_model

    _, tokenizer = load_model(job["model"], dtype=job["precision"])
    ids = tokenizer("\n\n".join(material.articles("nyt")), add_special_tokens=False, verbose=False)["input_ids"]
    lengths = random.Random(0)
    rows = []
    at = 0
    while at + 2048 <= len(ids):
        length = lengths.randint(1024, 2040)  # re-read, a piece may have a few tokens more than it was cut to
        rows.append({"text": tokenizer.decode(ids[at : at + length])})
        at += length
    material.write_rows(Path(job["output"]), rows)
    return {"rows": len(rows)}


def score(job: Job) -> dict[str, Any]:
    """The share of right answers of each finished adapter, all by lorakit's evaluator on the same base."""
    import lorakit as lk
    from lorakit.train.data.reading import load_rows
    from lorakit.train.run import class_list, evaluation_set, examine, load_base, path_for

    config = configuration(job)
    classes = None
    if "task" not in job:
        config = config.replace(evaluate__answers="score", evaluate__choices=("positive", "negative"))
    model, tokenizer = load_base(config, load_rows(job["rows"]))
    if "task" in job:
        classes = class_list(model)
    held = evaluation_set(load_rows(job["held_out"]), tokenizer, config, classes)
    path = path_for(config, model)
    found: dict[str, Any] = {}
    for name, folder in job["adapters"].items():
        adapter = lk.load(model, folder, name="scored")
        with lk.use(model, adapter.name):
            done = examine(model, tokenizer, held, config, path)
        found[name] = {"accuracy": done.accuracy, "loss": done.loss}
        lk.detach(model, adapter.name)
    return {"scores": found}


def run_attach(job: Job) -> dict[str, Any]:
    """Seconds to attach an adapter to every linear layer of every block, and to switch between two."""
    import lorakit as lk
    from lorakit.models.loading import load_model

    model, _ = load_model(job["model"], dtype=job["precision"])
    spec = lk.LoRA(rank=job["rank"], alpha=job["alpha"])
    attach = []
    layers = 0
    for _ in range(21):
        begin = time.perf_counter()
        adapter = lk.attach(model, spec, name="timed")
        attach.append(time.perf_counter() - begin)
        layers = len(adapter.layers)
        lk.detach(model, "timed")
    for name in ("one", "two"):
        lk.attach(model, spec, name=name)
    switch = []
    for turn in range(2000):
        name = ("one", "two")[turn % 2]
        begin = time.perf_counter()
        lk.activate(model, name)
        switch.append(time.perf_counter() - begin)
    return {"attach": attach[1:], "switch": switch[100:], "layers": layers}


DOERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "lorakit": run_lorakit,
    "trl": run_trl,
    "loop": run_loop,
    "trainer": run_trainer,
    "start": write_start,
    "newspaper": write_newspaper,
    "score": score,
    "attach": run_attach,
}


if __name__ == "__main__":
    main(sys.argv[1])
