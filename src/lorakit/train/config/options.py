"""Every option of a training run, declared once: its type, default, range and one line of documentation.

Files, flags, `--help`, the comments of a stored configuration, the JSON schema and the tables of the documentation follow from
these models; `section.py` reads and checks them. The options of a method, a start or a quantisation format are declared by
their specs (`lorakit.core.options`) and chosen here by name (`choices.py`).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from lorakit.train.config.choices import INIT, METHOD, QUANTISATION, read_pattern
from lorakit.train.config.section import Section, rule
from lorakit.train.config.sources import SOURCES, Format, Source, as_sources

Names = tuple[str, ...]
Schedule = Literal[
    "auto", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "constant",
    "constant_with_warmup", "inverse_sqrt", "polynomial", "warmup_stable_decay", "rex", "reduce_lr_on_plateau", "greedy",
]  # fmt: skip


def option(default: Any, doc: str, **declared: Any) -> Any:
    """A field with its default, its one line of documentation, and its range (`ge=1`, `lt=1`, ...)."""
    return Field(default, description=doc, **declared)


class DataOptions(Section, frozen=True):
    """Which rows are trained on, and how a row becomes tokens and labels."""

    SECTION: ClassVar[str] = "data"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "train": "Data",
        "format": "Rows, templates and labels",
        "streaming": "Large data",
    }

    train: Annotated[Any, SOURCES] = Field(
        description="rows to train on: a JSONL, JSON, CSV, TSV, Parquet, Arrow or text file, a pattern, a folder, a `datasets` "
        "name, or a list of these; a source with options of its own is {path: chats.jsonl, format: messages, columns: {...}, "
        "template: ..., split: ..., weight: 0.5}"
    )
    mix: Literal["concatenate", "first-exhausted", "all-exhausted"] = option(
        "concatenate",
        "several sources: concatenate them, or interleave them, each drawn with the probability `weight`, until the first is "
        "exhausted or until all are (the rows of shorter ones repeat)",
    )
    evaluation: Annotated[Any, SOURCES] = option(None, "rows to evaluate on, given as for `train`")
    evaluation_size: int | float = option(
        0, "rows of `train` held out for evaluation: a count, or a share below 1", ge=0
    )
    evaluation_limit: int | None = option(None, "use at most this many rows for evaluation", ge=1)
    subset: str | None = option(None, "the configuration of a `datasets` name")
    split: str = option("train", "the split of a dataset or folder to train on")
    evaluation_split: str | None = option(
        None, "the split to evaluate on, of `evaluation` if that is given, else of `train`"
    )
    limit: int | None = option(None, "use at most this many rows for training", ge=1)
    shuffle_seed: int | None = option(0, "seed of shuffling the rows, before any are held out; null keeps their order")
    format: Format = option(
        "auto",
        "prompt and completion, messages, text, tokens (input_ids), or text and label (classification); auto: by the columns",
    )
    columns: dict[str, str] = option({}, "rename columns: {prompt: your_column, completion: another_column}")
    template: str | None = option(
        None,
        "prompt template: null for the model's chat template, text with {prompt}-like placeholders ending in {completion}, a "
        "Jinja chat template, or a file with either",
    )
    template_arguments: dict[str, Any] = option({}, "arguments of the chat template: {enable_thinking: false}")
    date: str | None = option(
        None,
        "what a chat template that writes today's date writes instead, in training and ever after (YYYY-MM-DD); null: the day "
        "of the training",
    )
    system: str | None = option(None, "system message for rows that have none")
    special_tokens: Names = option(
        (),
        "new special tokens: their rows of the embedding (and of the output head) train with the adapter, and no others",
    )
    ignore: Names = option((), "columns and fields of messages that are left out on purpose")
    max_length: int = option(1024, "maximum tokens per example; longer ones are handled by `overflow`", ge=2)
    overflow: Literal["cut", "cut-start", "split", "drop", "refuse"] = option(
        "cut",
        "examples over `max_length`: cut (truncate) the end, cut-start, split into several (text only), drop, or refuse",
    )
    pack_to: int | None = option(
        None,
        "packing for continued pretraining: texts one after another, cut into blocks of this many tokens; `max_length` and "
        "`overflow` are not used",
        ge=2,
    )
    pack_across: bool = option(
        False,
        "with `pack_to`, attention crosses from one text of a block into the next; false: each text is read alone",
    )
    completion_only_loss: bool = option(True, "loss on completions and assistant turns only; false: on prompts too")
    turns: Literal["all", "last", "marked"] = option(
        "all",
        "assistant turns that carry loss: all (but those with train: false or weight: 0), the last of a conversation, or those "
        "marked by train: true or weight: 1",
    )
    on_bad_row: Literal["raise", "skip"] = option(
        "raise", "a row that cannot be used: raise an error, or skip and count it"
    )
    cache: Literal["auto", "on", "off"] = option(
        "auto",
        "keep the tokenised rows on disk for the next run over the same files, tokenizer and options; auto: for files of more "
        "than 64 MB",
    )
    streaming: bool = option(
        False, "read rows as they come, for data larger than the disk: nothing is kept; needs train.max_steps"
    )
    shuffle_buffer: int = option(10_000, "with `streaming`, rows held at a time to be drawn from at random", ge=1)

    @field_validator("template")
    @classmethod
    def _line_breaks(cls, text: str | None) -> str | None:
        """A shell, and YAML without double quotes, leave `\\n` in a text template as two characters; Jinja reads it itself."""
        if text is None or "{" not in text or "{{" in text or "{%" in text:
            return text
        return text.replace("\\n", "\n").replace("\\t", "\t")

    @model_validator(mode="after")
    def _a_date(self) -> Self:
        try:
            datetime.date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            raise rule(f"data.date is {self.date!r}; a date is written YYYY-MM-DD", "date") from None
        return self

    @model_validator(mode="after")
    def _one_evaluation(self) -> Self:
        if self.evaluation_size and (self.evaluation is not None or self.evaluation_split is not None):
            raise rule(
                f"data.evaluation_size is {self.evaluation_size} while evaluation data is named too; "
                "keep one: rows held out of `train`, or rows of their own",
                "evaluation_size",
            )
        return self

    @model_validator(mode="after")
    def _mixed(self) -> Self:
        """What weights and the other options of large data ask of each other."""
        given = [source.weight for source in self.train_sources if source.weight is not None]
        if self.mix == "concatenate" and given:
            raise rule(
                "data.train: a weight is the probability of an interleaved source, and data.mix is concatenate; set data.mix: "
                "first-exhausted or all-exhausted, or give no weight",
                "train",
            )
        if self.mix != "concatenate" and len(self.train_sources) < 2:
            raise rule(f"data.mix is {self.mix}, which needs several sources in data.train; found one", "mix")
        if given and len(given) < len(self.train_sources):
            missing = next(one.path for one in self.train_sources if one.weight is None)
            raise rule(
                f"data.train: {missing} has no weight while others have; give one to each source, or none", "train"
            )
        if given and abs(sum(given) - 1) > 1e-3:
            shown = " and ".join(f"{one:g}" for one in given)
            raise rule(
                f"data.train: the weights {shown} sum to {sum(given):g}; as probabilities they sum to 1", "train"
            )
        if self.pack_across and self.pack_to is None:
            raise rule("data.pack_across is for packing to a length; set data.pack_to", "pack_across")
        if self.turns != "all" and not self.completion_only_loss:
            raise rule(
                f"data.turns is {self.turns} while data.completion_only_loss is false (loss on everything); keep one",
                "turns",
            )
        for name in ("evaluation_size", "pack_to") if self.streaming else ():
            if value := getattr(self, name):
                raise rule(f"data.{name} is {value}, which does not work with data.streaming: rows pass once", name)
        return self

    @property
    def train_sources(self) -> tuple[Source, ...]:
        """The sources to train on; one name is the list of one."""
        return as_sources(self.train)

    @property
    def evaluation_sources(self) -> tuple[Source, ...]:
        """The sources to evaluate on that are named for it."""
        return as_sources(self.evaluation)

    def of(self, number: int) -> Self:
        """The options of one source, by its number among those that rows are read of."""
        sources = (*self.train_sources, *self.evaluation_sources)
        own = sources[number].own if number < len(sources) else {}
        return self.replace(**own) if own else self

    @property
    def weights(self) -> list[float]:
        """The probability of each source, where they are interleaved."""
        sources = self.train_sources
        return [one.weight if one.weight is not None else 1 / len(sources) for one in sources]

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.evaluation_size) or self.evaluation is not None or self.evaluation_split is not None


class TrainOptions(Section, frozen=True):
    """How the adapter is trained."""

    SECTION: ClassVar[str] = "train"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "output": "Training",
        "optimizer": "Optimiser",
        "device": "Memory and speed",
        "logging_steps": "Logs, checkpoints and resuming",
    }

    output: str = option("adapters/default", "the folder for the finished adapter and its checkpoints")
    epochs: float = option(1.0, "passes over the data", gt=0)
    max_steps: int | None = option(None, "stop after this many optimiser steps, whatever `epochs` is", ge=1)
    batch_size: int = option(16, "examples per step on each device", ge=1)
    evaluation_batch_size: int = option(32, "examples per step during evaluation", ge=1)
    gradient_accumulation: int = option(1, "batches whose gradients make one optimiser step", ge=1)
    learning_rate: float | None = option(
        None,
        "the highest learning rate; null: one by method and size of the model, which the log names with its source",
        gt=0,
    )
    rates: dict[str, float] = option(
        {}, "other learning rates by pattern of layers or tensors: {embed_tokens: 1e-5, layers.0: 1e-4}"
    )
    scheduler: Schedule = option(
        "auto",
        "learning rate schedule after the warm-up; auto: linear, and constant for schedule-free optimizers; with restarts: "
        "cosine_with_restarts",
    )
    scheduler_options: dict[str, Any] = option(
        {},
        "further arguments of the schedule: {num_cycles: 3} for restarts, {min_lr_rate: 0.1}, {num_decay_steps: 100}",
    )
    warmup: int | float = option(0.03, "warm-up steps: a count, or a share of all steps below 1", ge=0)
    seed: int = option(0, "random seed of initial values, dropout and the order of batches", ge=0)
    optimizer: str = option(
        "adamw",
        "adamw, a class of torch.optim (SGD, Adafactor, ...), adamw-schedule-free, prodigy, lion, came, muon, galore (with "
        "method full), adamw-8bit, galore-8bit, paged-adamw or paged-adamw-8bit (GPUs), or any that is installed: "
        "some.module:Class",
    )
    optimizer_options: dict[str, Any] = option({}, "further arguments of the optimiser: {betas: [0.9, 0.95]}")
    loraplus_ratio: float | None = option(
        None, "LoRA+: learning rate of B over that of A (the paper suggests 16); null: the same for both", gt=0
    )
    weight_decay: float = option(0.0, "decoupled weight decay", ge=0)
    max_grad_norm: float = option(1.0, "gradient clipping: the largest gradient norm; 0 turns it off", ge=0)
    label_smoothing: float = option(0.0, "share of each target spread over all tokens", ge=0, lt=1)
    ema: float | None = option(
        None,
        "EMA: keep a moving average of the adapter with this decay (0.99, 0.999), which is evaluated and saved; null: off",
        gt=0,
        lt=1,
    )
    neftune: float | None = option(
        None, "NEFTune: alpha of the noise on embeddings while training (the paper uses 5, 10, 15); null: off", gt=0
    )
    group_by_length: bool = option(False, "put examples of similar length into the same batch")
    device: str = option("auto", "cpu, cuda (gpu), cuda:1, mps; auto: a GPU where there is one, else the CPU")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "number format (dtype) of the base and of compute; auto: bf16 where the device supports it, else fp32; fp16 scales "
        "the loss",
    )
    memory: Literal["fast", "balanced", "small", "offload"] = option(
        "fast",
        "gradient checkpointing: fast = off, balanced = recompute cheap activations, small = full (recompute blocks); "
        "offload = keep activations in the memory of the host",
    )
    fast_path: Literal["auto", "off"] = option(
        "auto",
        "packing: batches without padding, shared prefixes computed once, logits only at labelled tokens; auto: where the "
        "model supports it",
    )
    compile: Literal["auto", "off"] = option(
        "auto", "fuse small functions with torch.compile where a compiler is found"
    )
    logging_steps: int = option(10, "log every this many steps", ge=1)
    eval_steps: int | None = option(None, "evaluate every this many steps; null: after each epoch", ge=1)
    save_steps: int | None = option(None, "save a checkpoint every this many steps; null: after each epoch", ge=1)
    save_total_limit: int | None = option(2, "checkpoints to keep; null keeps all", ge=1)
    keep_best: bool = option(False, "finish with the checkpoint of the lowest evaluation loss instead of the last one")
    early_stopping_patience: int | None = option(
        None, "early stopping: stop after this many evaluations without a lower loss", ge=1
    )
    resume: bool | str = option(
        False, "resume from the newest checkpoint in `output` (true), or from this checkpoint folder"
    )
    report_to: Names = option((), "experiment trackers: tensorboard, trackio, wandb, ...")


class EvaluateOptions(Section, frozen=True):
    """What is measured besides loss and perplexity, before and after training."""

    SECTION: ClassVar[str] = "evaluate"
    HEADINGS: ClassVar[Mapping[str, str]] = {"answers": "Evaluation"}

    answers: Literal["none", "generate", "score"] = option(
        "none", "also compare answers: generate them, or score `choices` by probability and take the likeliest"
    )
    choices: Names = option((), "the possible answers; required for score")
    max_new_tokens: int = option(32, "maximum tokens of a generated answer", ge=1)
    ignore_case: bool = option(True, "compare answers without regard to upper and lower case")
    before_and_after: bool = option(True, "measure the base model too, before training")
    samples: int = option(3, "sample answers printed after training", ge=0)
    limit: int | None = option(None, "compare answers on at most this many rows", ge=1)

    @model_validator(mode="after")
    def _choices_to_score(self) -> Self:
        if self.answers == "score" and len(self.choices) < 2:
            raise rule(
                f"evaluate.answers is score, which needs evaluate.choices of at least two answers; "
                f"found {list(self.choices)}. Give the choices, or use answers: generate.",
                "answers",
            )
        return self


class TrainConfig(Section, frozen=True):
    """Everything that decides a run; `run.py` says how it is written in a file and as flags."""

    HEADINGS: ClassVar[Mapping[str, str]] = {"model": "The run", "target_modules": "Which layers are adapted"}

    model: str = Field(description="the base model: a hub name, a local folder, or a GGUF file")
    task: Literal[
        "auto", "causal-lm", "seq2seq", "masked-lm", "seq-cls", "pair-cls", "multi-label", "regression", "reranker",
        "token-cls", "question-answering", "embeddings",
    ] = option(
        "auto",
        "the objective, which decides the model's head, the columns of rows, the loss and the metric: causal-lm (text "
        "generation), seq-cls (a class of each text), and others; auto: that which the base was saved for",
    )  # fmt: skip
    quantize: Annotated[Any, QUANTISATION] = option(
        None,
        "quantise the base (QLoRA): nf4, fp4, int8 (bitsandbytes), torchao-int8, hqq, or {name: nf4, double: true, "
        "compute_dtype: bf16, skip: [down_proj]}; a model that is quantised already needs nothing here",
    )
    name: str = option("default", "the adapter's name")
    method: Annotated[Any, METHOD] = option(
        "lora",
        "the method: a name (`lorakit methods` lists them) or {name: lora, rank: 8, ...}; its options may also stand beside it",
        validate_default=True,
    )
    adapters: Names = option(
        (), "adapter folders, for a method that routes adapters (arrow, lorahub, mole, retrieval, xlora)"
    )
    continue_from: str | None = option(
        None,
        "--from: continue training this adapter (a folder, a checkpoint, PEFT's, a hub name), with its "
        "method, layers and prompt",
    )
    init: Annotated[Any, INIT] = option(
        "default",
        "initial values: default (the method's own), a name such as pissa or eva, or {name: pissa, iterations: 4}; those that "
        "measure inputs or gradients use training rows",
        validate_default=True,
    )
    target_modules: str | Names = option(
        "all-linear",
        "layers to adapt: all-linear, attention, mlp, cross-attention, vision, language, projector, text-encoder, a list of "
        "name endings, or one regular expression",
    )
    exclude_modules: str | Names | None = option(None, "layers to leave out: name endings or one regular expression")
    layers: int | tuple[int, ...] | None = option(None, "adapt only the blocks with these numbers")
    patterns: dict[str, Any] = option(
        {}, "other values of a method's options for some layers: {rank: {q_proj: 4}}, or rank_pattern: {q_proj: 4}"
    )
    modules_to_save: Names = option((), "modules trained in full and saved with the adapter")
    bias: Literal["none", "all", "lora_only"] = option(
        "none", "biases to train: none, all, or lora_only (those of adapted layers)"
    )
    overwrite: bool = option(False, "replace the result of an earlier run in `train.output`")
    data: DataOptions
    train: TrainOptions = TrainOptions()
    evaluate: EvaluateOptions = EvaluateOptions()

    @model_validator(mode="before")
    @classmethod
    def _lift_patterns(cls, values: Any) -> Any:
        """`rank_pattern={...}` is `patterns={"rank": {...}}`, and rows that nobody named are missed by name."""
        given = {"data": {}, **values}
        for key in [key for key in given if key.endswith("_pattern")]:
            given["patterns"] = {**given.get("patterns", {}), key.removesuffix("_pattern"): given.pop(key)}
        return given

    @model_validator(mode="after")
    def _rules(self) -> Self:
        """What options ask of each other."""
        for text in self._conflicts():
            raise rule(text, *text.split(maxsplit=1)[0].split("."))
        known = METHOD.patterns(self.method)
        for name, values in list(self.patterns.items()):
            if values == {}:
                del self.patterns[name]  # says nothing, to a method without such an option too
            elif name not in known:
                raise rule(
                    f"{name}_pattern was given, but {METHOD.name_of(self.method)} has no {name} per layer; what may differ per "
                    f"layer is {', '.join(known) or 'nothing'}.",
                    "patterns",
                    name,
                )
            else:
                self.patterns[name] = read_pattern(known[name], values)
        return self

    def _conflicts(self) -> Iterator[str]:
        """The options that contradict others, as messages that begin with the name of the one to blame."""
        from lorakit.experts import RouterSpec

        named = {"model": self.model, "name": self.name, "target_modules": self.target_modules}
        named |= {"data.train": self.data.train, "train.output": self.train.output}
        for name in (name for name, text in named.items() if text == ""):
            yield f"{name} is empty text; leave it out, or name one"
        counts = {"data.evaluation_size": self.data.evaluation_size, "train.warmup": self.train.warmup}
        for name, value in ((name, value) for name, value in counts.items() if value >= 1 and value % 1):
            yield f"{name} is {value:g}; give a share below 1, or a count, which is an integer"
        for needs in ("early_stopping_patience", "keep_best", "eval_steps"):
            if (asked := getattr(self.train, needs)) and not self.data.evaluates:
                yield (
                    f"train.{needs} is {asked}, which needs rows to evaluate on; found none. "
                    "Give data.evaluation, data.evaluation_split or data.evaluation_size."
                )
        yield from self._optimizer_conflicts()
        method, answers, layout = METHOD.name_of(self.method), self.evaluate.answers, self.data.format
        routes = isinstance(self.method, RouterSpec)
        task = None if self.task in ("auto", "causal-lm") else self.task
        if routes and not self.adapters and self.continue_from is None:
            yield f"method is {method}, which routes adapters; name their folders in adapters"
        if routes and self.data.special_tokens:
            yield f"data.special_tokens is given, but method is {method}, which trains no embeddings; give them to an adapter"
        if self.adapters and not routes:
            yield f"method is {method}, which routes none; adapters are for routers"
        if task and layout not in ("auto", "classification"):
            yield f"data.format is {layout} while task is {task}, which knows rows by their columns; use classification or auto"
        if layout == "classification" and self.task != "seq-cls":
            yield "data.format is classification, which needs task: seq-cls"
        if task and answers != "none":
            yield f"evaluate.answers is {answers} while task is {task}, whose metric is measured anyway; leave it at none"
        for name in ("template", "system", "pack_to", "special_tokens") if task else ():
            if getattr(self.data, name):
                yield f"data.{name} is given while task is {task}, whose rows are no prompts; leave it out"
        if self.data.streaming:
            if self.train.max_steps is None:
                yield "train.max_steps is not given, and rows that are streamed have no end; say how many steps to train"
            if getattr(self.init, "needs", None) in ("inputs", "gradients"):
                yield f"init is {INIT.name_of(self.init)}, which measures rows drawn from all; with data.streaming use default"
            if self.train.group_by_length:
                yield "train.group_by_length orders all rows, and data.streaming has them one after another; turn one off"
            if task:
                yield f"data.streaming is on while task is {task}, whose rows are all read first; turn it off"
            if self.data.evaluation_split is not None and self.data.evaluation is None:
                yield "data.evaluation_split is a split of what is streamed; name the rows by data.evaluation too"
        if layout in ("text", "tokens") and answers != "none":
            yield f"evaluate.answers is {answers}, but rows of {layout} hold no answer; use prompt-completion or messages"

    def _optimizer_conflicts(self) -> Iterator[str]:
        options, optimizer = self.train, self.train.optimizer.lower()
        schedule_free = "schedulefree" in re.sub("[^a-z]", "", optimizer)
        if options.scheduler in ("reduce_lr_on_plateau", "greedy") and not self.data.evaluates:
            yield f"train.scheduler is {options.scheduler}, which follows the evaluation loss; give data.evaluation_size"
        if schedule_free and options.scheduler not in ("auto", "constant", "constant_with_warmup"):
            yield (
                f"train.scheduler is {options.scheduler} while train.optimizer is {optimizer}, which needs no schedule; use "
                "auto or constant"
            )
        if getattr(self.method, "schedule", None) is not None and (schedule_free or options.ema):
            asked = f"train.ema is {options.ema}" if options.ema else f"train.optimizer is {options.optimizer}"
            yield (
                f"{asked}, an average of steps, while {METHOD.name_of(self.method)} changes its ranks or restarts between "
                "them; use another method, or adamw without an average"
            )
        if schedule_free and options.ema:
            yield f"train.ema is {options.ema} while {options.optimizer} averages by itself; keep one of them"
        if "prodigy" in optimizer and (options.rates or (options.loraplus_ratio or 1) != 1):
            yield f"train.optimizer is {options.optimizer}, which has one rate; leave train.rates and loraplus_ratio out"

    def attach_arguments(self) -> dict[str, Any]:
        """The keyword arguments for `lorakit.attach(model, config.method, **config.attach_arguments())`."""
        given = ("name", "target_modules", "exclude_modules", "layers", "bias", "init")
        values = {name: getattr(self, name) for name in given}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "patterns": dict(self.patterns) or None,
            "modules_to_save": list(self.modules_to_save) or None,
        }
