"""Every option of a training run, as frozen dataclasses: its type, default, range and one-line doc.

This is the one list. Files, flags, `--help`, the comments of a stored configuration and the generated
documentation are all read from it; `config.py` says how.
"""
# ruff: noqa: RUF009 - `option` makes dataclass fields, as dataclasses.field does

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.errors import LorakitError
from lorakit.experts import RouterSpec
from lorakit.train.config.choices import (
    initialisers,
    methods,
    read_init,
    read_method,
    read_quantize,
    write_init,
    write_method,
    write_quantize,
)
from lorakit.train.config.schema import check, option

Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which rows are trained on, and how a row becomes tokens and labels."""

    train: str | Names = option(
        doc="rows to train on: a JSONL, JSON, CSV, TSV or Parquet file, a folder, a `datasets` name, or a list of these"
    )
    evaluation: str | Names | None = option(None, "rows to evaluate on, as `train`")
    evaluation_size: int | float = option(
        0, "rows held out of `train` to evaluate on: a count, or a share below 1", minimum=0
    )
    evaluation_limit: int | None = option(None, "use at most so many rows to evaluate on", minimum=1)
    subset: str | None = option(None, "the configuration of a `datasets` name")
    split: str = option("train", "the split of a dataset or folder to train on")
    evaluation_split: str | None = option(None, "the split to evaluate on (of `evaluation`, else of `train`)")
    limit: int | None = option(None, "use at most so many rows to train on", minimum=1)
    shuffle_seed: int | None = option(
        0, "shuffles the rows once, before rows are held out or limited; null keeps their order"
    )
    format: Literal["auto", "prompt-completion", "messages", "text", "classification"] = option(
        "auto",
        "what a row holds: prompt and completion, messages, text, or text and label; auto looks at the columns",
    )
    columns: dict[str, str] = option(
        factory=dict, doc="columns under other names, ours to theirs: {prompt: question, completion: answer}"
    )
    template: str | None = option(
        None,
        "null: the model's chat template; else text with {prompt}-like placeholders ending in {completion}, "
        "a Jinja chat template, or a file with either",
    )
    system: str | None = option(None, "a system message for rows that have none")
    max_length: int = option(1024, "the longest example in tokens; what exceeds it is treated by `overflow`", minimum=2)
    overflow: Literal["cut", "cut-start", "split", "drop", "refuse"] = option(
        "cut",
        "too long rows: cut the end, cut the start, split into several examples (text only), drop, or refuse; counted",
    )
    completion_only_loss: bool = option(True, "loss on completions and assistant turns alone, not on prompts")
    on_bad_row: Literal["raise", "skip"] = option("raise", "a row that cannot be used: stop, or skip and count it")

    def __post_init__(self) -> None:
        check(self, "data")
        if self.evaluation_size and (self.evaluation is not None or self.evaluation_split is not None):
            raise LorakitError(
                f"data.evaluation_size is {self.evaluation_size} while evaluation data is named too; "
                "keep one: rows held out of `train`, or rows of their own"
            )

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.evaluation_size) or self.evaluation is not None or self.evaluation_split is not None


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How the adapter is trained."""

    output: str = option("adapters/default", "the folder of the finished adapter and its checkpoints")
    epochs: float = option(1.0, "passes over the data", above=0)
    max_steps: int | None = option(None, "stop after so many optimiser steps, whatever `epochs` says", minimum=1)
    batch_size: int = option(16, "examples per step on each device", minimum=1)
    evaluation_batch_size: int = option(32, "examples per step when evaluating", minimum=1)
    gradient_accumulation: int = option(1, "batches whose gradients make one optimiser step", minimum=1)
    learning_rate: float = option(2e-4, "the highest learning rate", above=0)
    scheduler: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "cosine_with_min_lr",
        "inverse_sqrt",
        "polynomial",
    ] = option("linear", "how the learning rate falls after the warm-up")
    warmup: int | float = option(0.03, "steps of rising learning rate: a count, or a share below 1", minimum=0)
    weight_decay: float = option(0.0, "decoupled weight decay", minimum=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 does not", minimum=0)
    optimizer: str = option(
        "adamw",
        "adamw, a class of torch.optim (SGD, Adafactor, ...), muon, galore (with method full), adamw-8bit, galore-8bit, "
        "paged-adamw and paged-adamw-8bit (GPUs)",
    )
    optimizer_options: dict[str, Any] = option(
        factory=dict, doc="further arguments of the optimiser: {betas: [0.9, 0.95]}"
    )
    loraplus_ratio: float | None = option(
        None,
        "LoRA+: learning rate of B over that of A (the paper suggests 16); null trains both alike",
        above=0,
    )
    label_smoothing: float = option(0.0, "share of the target spread over all tokens", minimum=0, below=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "number format of the base and of compute; auto is bf16 where the processor has it, else fp32"
    )
    memory: Literal["fast", "balanced", "small"] = option(
        "fast",
        "activations kept for the backward: all, all but the cheap ones, or one block's (the rest is computed again)",
    )
    fast_path: Literal["auto", "off"] = option(
        "auto",
        "unpadded batches, shared prefixes, loss only where labels are; auto uses it where the model allows",
    )
    compile: Literal["auto", "off"] = option("auto", "fuse small functions by torch.compile where a compiler is found")
    seed: int = option(0, "seed of initial values, dropout and the order of batches", minimum=0)
    logging_steps: int = option(10, "log every so many steps", minimum=1)
    eval_steps: int | None = option(None, "evaluate every so many steps; null: after each epoch", minimum=1)
    save_steps: int | None = option(None, "write a checkpoint every so many steps; null: after each epoch", minimum=1)
    save_total_limit: int | None = option(2, "checkpoints kept; null keeps all", minimum=1)
    keep_best: bool = option(False, "finish with the checkpoint of the lowest evaluation loss instead of the last one")
    early_stopping_patience: int | None = option(None, "stop after so many evaluations without a lower loss", minimum=1)
    resume: bool | str = option(
        False, "continue from the newest checkpoint in `output` (true), or from this checkpoint"
    )
    report_to: Names = option((), "trackers: tensorboard, trackio, wandb, ...")

    def __post_init__(self) -> None:
        check(self, "train")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is measured besides loss and perplexity, before and after training."""

    answers: Literal["none", "generate", "score"] = option(
        "none",
        "also compare answers: generate them, or score `choices` by probability and take the likeliest",
    )
    choices: Names = option((), "the possible answers; required to score")
    max_new_tokens: int = option(32, "the longest generated answer in tokens", minimum=1)
    ignore_case: bool = option(True, "compare answers without regard to upper and lower case")
    before_and_after: bool = option(True, "measure the base model too, before training")
    samples: int = option(3, "answers printed after training", minimum=0)
    limit: int | None = option(None, "compare answers on at most so many rows", minimum=1)

    def __post_init__(self) -> None:
        check(self, "evaluate")
        if self.answers == "score" and len(self.choices) < 2:
            raise LorakitError(
                f"evaluate.answers is score, which needs evaluate.choices of at least two answers; "
                f"found {list(self.choices)}. Give the choices, or use answers: generate."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. See the module's docstring for the file form."""

    model: str = option(doc="the base model: a hub name, a local folder, or a GGUF file")
    task: Literal["causal-lm", "seq-cls"] = option(
        "causal-lm",
        "what is learned: to go on with a text, or the class of a text (rows of text and label; the head is trained too)",
    )
    quantize: Any = option(
        None,
        "hold the base in few bits: nf4, fp4, int8 (bitsandbytes), torchao-int8, hqq, or {name: nf4, double: true, "
        "compute_dtype: bf16, skip: [down_proj]}; a model that is quantised already needs nothing here",
        reader=read_quantize,
        writer=write_quantize,
        shown="a format or null",
    )
    name: str = option("default", "the adapter's name")
    method: Any = option(
        factory=lambda: methods()["lora"](),
        doc="the method: its name, or a mapping {name: lora, rank: 8, ...}; its options may also stand beside it",
        reader=read_method,
        writer=write_method,
        shown="a method",
    )
    adapters: Names = option(
        (), "for a method that is a router (xlora, mole): the folders of the adapters that it routes"
    )
    init: Any = option(
        factory=lambda: initialisers()["default"](),
        doc="how the factors start: default (the method's own), a name such as pissa or eva, or {name: pissa, iterations: 4}; "
        "starts that measure inputs or gradients do so on training rows",
        reader=read_init,
        writer=write_init,
        shown="an initialiser",
    )
    target_modules: str | Names = option(
        "all-linear",
        "layers to adapt: all-linear, attention, mlp, a list of name endings, or one regular expression",
    )
    exclude_modules: str | Names | None = option(None, "layers to leave out: name endings or one regular expression")
    layers: int | tuple[int, ...] | None = option(None, "adapt only blocks with these numbers")
    rank_pattern: dict[str, int] = option(factory=dict, doc="other ranks for some layers: {q_proj: 4}")
    alpha_pattern: dict[str, float] = option(factory=dict, doc="other alphas for some layers: {q_proj: 8}")
    modules_to_save: Names = option((), "modules trained in full and saved with the adapter")
    bias: Literal["none", "all", "lora_only"] = option("none", "biases that are trained")
    data: DataOptions = option()
    train: TrainOptions = option(factory=TrainOptions)
    evaluate: EvaluateOptions = option(factory=EvaluateOptions)

    def __post_init__(self) -> None:
        check(self)
        for needs, asked in (
            ("train.early_stopping_patience", self.train.early_stopping_patience),
            ("train.keep_best", self.train.keep_best),
            ("train.eval_steps", self.train.eval_steps),
        ):
            if asked and not self.data.evaluates:
                raise LorakitError(
                    f"{needs} is {asked}, which needs rows to evaluate on; found none. "
                    "Give data.evaluation, data.evaluation_split or data.evaluation_size."
                )
        routes = isinstance(self.method, RouterSpec)
        if routes != bool(self.adapters):
            raise LorakitError(
                f"method is {self.method.name}, which "
                + (
                    "routes adapters; name their folders in adapters"
                    if routes
                    else "routes none; adapters are for routers"
                )
            )
        classifies = self.task == "seq-cls"
        if classifies and self.data.format not in ("auto", "classification"):
            raise LorakitError(
                f"data.format is {self.data.format} while task is seq-cls, which learns from rows of text and label; use "
                "classification or auto"
            )
        if self.data.format == "classification" and not classifies:
            raise LorakitError("data.format is classification, which needs task: seq-cls")
        if classifies and self.evaluate.answers != "none":
            raise LorakitError(
                f"evaluate.answers is {self.evaluate.answers} while task is seq-cls, whose accuracy is measured anyway; "
                "leave it at none"
            )
        if self.evaluate.answers != "none" and self.data.format == "text":
            raise LorakitError(
                f"evaluate.answers is {self.evaluate.answers}, but rows of format {self.data.format} hold no answer to "
                "compare; use prompt-completion or messages"
            )

    def attach_arguments(self) -> dict[str, Any]:
        """The keyword arguments for `lorakit.attach(model, config.method, **config.attach_arguments())`."""

        def opened(value: Any) -> Any:
            return list(value) if isinstance(value, tuple) else value

        return {
            "name": self.name,
            "target_modules": opened(self.target_modules),
            "exclude_modules": opened(self.exclude_modules),
            "layers": opened(self.layers),
            "rank_pattern": dict(self.rank_pattern) or None,
            "alpha_pattern": dict(self.alpha_pattern) or None,
            "modules_to_save": list(self.modules_to_save) or None,
            "bias": self.bias,
            "init": self.init,
        }

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values, dots as double underscores: `config.replace(train__max_steps=5)`."""
        own: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            section, dots, name = key.partition("__")
            if dots:
                inner.setdefault(section, {})[name] = value
            else:
                own[key] = value
        for section, values in inner.items():
            own[section] = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **own)
