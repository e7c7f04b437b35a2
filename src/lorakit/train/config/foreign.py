"""Files of Axolotl and LLaMA-Factory as lorakit's options: one table of keys and values, and what has no equivalent and why.

`lorakit init --from FILE` writes what is here as a file of lorakit's. A key is one of four things: the same under another name
(`RENAMED`), a value that must be made into others (`CONVERTED`), something that lorakit does or decides by itself (`NEEDLESS`),
or something that it has no equivalent for (`WITHOUT`, and whatever is unknown). What was left out is listed, never dropped in
silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.reading import read_json, read_text
from lorakit.train.config.document import parse_document

RENAMED = {
    theirs: ours
    for ours, names in {
        "model": "base_model model_name_or_path",
        "rank": "r lora_r lora_rank",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "use_rslora peft_use_rslora",
        "layers": "layers_to_transform peft_layers_to_transform",
        "init": "init_lora_weights peft_init_lora_weights",
        "modules_to_save": "lora_modules_to_save",
        "continue_from": "lora_model_dir adapter_name_or_path",
        "overwrite": "overwrite_output_dir",
        "data.train": "dataset",
        "data.max_length": "max_seq_length sequence_len cutoff_len",
        "data.evaluation_size": "val_set_size val_size",
        "data.limit": "max_samples",
        "data.system": "default_system default_system_message",
        "train.output": "output_dir",
        "train.epochs": "num_train_epochs num_epochs",
        "train.max_steps": "max_steps",
        "train.batch_size": "per_device_train_batch_size micro_batch_size",
        "train.evaluation_batch_size": "per_device_eval_batch_size eval_batch_size",
        "train.gradient_accumulation": "gradient_accumulation_steps",
        "train.learning_rate": "lr learning_rate",
        "train.scheduler": "lr_scheduler_type lr_scheduler",
        "train.scheduler_options": "lr_scheduler_kwargs",
        "train.warmup": "warmup_steps warmup_ratio",
        "train.optimizer": "optim optimizer",
        "train.weight_decay": "weight_decay",
        "train.max_grad_norm": "max_grad_norm",
        "train.label_smoothing": "label_smoothing_factor",
        "train.neftune": "neftune_noise_alpha noise_alpha",
        "train.group_by_length": "group_by_length",
        "train.device": "device_map use_cpu",
        "train.memory": "gradient_checkpointing",
        "train.fast_path": "packing padding_free",
        "train.precision": "bf16 fp16",
        "train.logging_steps": "logging_steps",
        "train.eval_steps": "eval_steps",
        "train.save_steps": "save_steps",
        "train.save_total_limit": "save_total_limit",
        "train.keep_best": "load_best_model_at_end",
        "train.early_stopping_patience": "early_stopping_patience",
        "train.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
        "train.report_to": "report_to",
        "train.seed": "seed",
        "train.loraplus_ratio": "loraplus_lr_ratio",
    }.items()
    for theirs in names.split()
}
"""Names of PEFT, the Trainer, Axolotl and LLaMA-Factory to ours; also for the hint of a refusal, never as aliases."""

OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
    "adamw_bnb_8bit": "adamw-8bit", "adamw_8bit": "adamw-8bit", "paged_adamw_32bit": "paged-adamw",
    "paged_adamw": "paged-adamw", "paged_adamw_8bit": "paged-adamw-8bit", "lion_pytorch": "lion", "lion_32bit": "lion",
    "came_pytorch": "came", "schedule_free_adamw": "adamw-schedule-free", "adafactor": "Adafactor", "sgd": "SGD",
    "rmsprop": "RMSprop", "adagrad": "Adagrad", "galore_adamw": "galore", "galore_adamw_8bit": "galore-8bit",
    "muon": "muon", "prodigy": "prodigy",
}  # fmt: skip
"""What others call an optimizer."""

NEEDLESS = {
    "model_type": "the class follows from the model",
    "tokenizer_type": "the tokenizer follows from the model",
    "is_llama_derived_model": "", "strict": "", "debug": "", "do_train": "", "do_eval": "", "plot_loss": "",
    "sample_packing": "examples are packed without padding anyway, and never attend to each other",
    "eval_sample_packing": "", "pad_to_sequence_len": "", "neat_packing": "", "packing": "", "flash_attention": "",
    "flash_attn": "", "sdp_attention": "", "xformers_attention": "", "attn_implementation": "", "s2_attention": "",
    "lora_mlp_kernel": "", "lora_qkv_kernel": "", "lora_o_kernel": "", "enable_liger_kernel": "", "use_unsloth": "",
    "plugins": "", "liger_rope": "", "liger_rms_norm": "", "liger_glu_activation": "", "liger_fused_linear_cross_entropy": "",
    "cut_cross_entropy": "", "tf32": "", "ddp_timeout": "", "overwrite_cache": "", "preprocessing_num_workers": "",
    "dataset_processes": "", "dataset_prepared_path": "", "dataloader_num_workers": "", "dataloader_pin_memory": "",
    "dataloader_prefetch_factor": "", "gradient_checkpointing_kwargs": "", "include_tokens_per_second": "",
    "include_num_input_tokens_seen": "", "save_strategy": "", "eval_strategy": "", "evaluation_strategy": "",
    "save_safetensors": "", "save_only_model": "", "logging_strategy": "", "dataset_dir": "", "local_rank": "",
    "quantization_method": "", "upcast_layernorm": "", "remove_unused_columns": "", "shuffle_before_merging_datasets": "",
}  # fmt: skip
"""What lorakit does, or decides, by itself."""

WITHOUT = {
    "deepspeed": "the model is not sharded; several processes hold a copy each (torchrun)",
    "fsdp": "the model is not sharded; several processes hold a copy each (torchrun)",
    "fsdp_config": "the model is not sharded",
    "rl": "preferences and reinforcement learning",
    "pref_beta": "preferences", "pref_loss": "preferences", "dpo_beta": "preferences",
    "wandb_project": "set WANDB_PROJECT in the environment", "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_name": "set WANDB_NAME in the environment", "wandb_run_id": "set WANDB_RUN_ID in the environment",
    "wandb_log_model": "set WANDB_LOG_MODEL in the environment", "run_name": "set WANDB_NAME in the environment",
    "wandb_watch": "set WANDB_WATCH in the environment",
    "hub_model_id": "`lorakit push` uploads the finished adapter", "push_to_hub": "`lorakit push` uploads the adapter",
    "hub_strategy": "`lorakit push` uploads the finished adapter",
    "trust_remote_code": "code of a model's repository is not run", "unfrozen_parameters": "method: full, with target_modules",
    "relora_steps": "use method: relora with its option every", "sequence_parallel_degree": "one process sees whole rows",
    "evals_per_epoch": "train.eval_steps counts steps; without it there is one evaluation an epoch",
    "saves_per_epoch": "train.save_steps counts steps; without it there is one checkpoint an epoch",
    "special_tokens": "the model's own; new ones: data.special_tokens",
    "export_dir": "`lorakit merge` writes a merged model", "rope_scaling": "the model's own",
    "max_new_tokens": "evaluate.max_new_tokens, with evaluate.answers",
}  # fmt: skip
"""What has no equivalent, and what to do instead."""

Given = Mapping[str, Any]
Tree = dict[str, Any]


def _flag(**ours: Any) -> Callable[[Any, Given], Tree]:
    """Options for a key that is true; none where it is false."""
    return lambda value, _: {name.replace("__", "."): one for name, one in ours.items()} if value else {}


def _choose(table: Mapping[str, str], ours: str) -> Callable[[Any, Given], Tree]:
    return lambda value, _: {ours: table.get(str(value).lower(), value)}


def _precision(name: str) -> Callable[[Any, Given], Tree]:
    return lambda value, _: {"train.precision": "auto" if value == "auto" else name} if value else {}


def _betas(value: Any, given: Given) -> Tree:
    betas = [given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999)]
    return {"train.optimizer_options.betas": betas}


def _listed(value: Any) -> list[str]:
    return [one.strip() for one in value.split(",")] if isinstance(value, str) else list(value)


def _targets(value: Any, _: Given) -> Tree:
    return {"target_modules": "all-linear" if value in ("all", "all-linear", ["all"]) else _listed(value)}


def _steps(ours: str) -> Callable[[Any, Given], Tree]:
    """A number of steps; a share of the run below 1 has no equivalent."""

    def read(value: Any, _: Given) -> Tree:
        if isinstance(value, float) and value < 1:
            raise LorakitError("counts steps here; a share of the run has no equivalent")
        return {ours: value}

    return read


def _scheduler(value: Any, given: Given) -> Tree:
    if given.get("cosine_min_lr_ratio") is not None and value == "cosine":
        return {"train.scheduler": "cosine_with_min_lr"}
    if value == "one_cycle":
        raise LorakitError("one_cycle is not among the schedules; cosine with train.warmup is the nearest")
    return {"train.scheduler": value}


def _adapter(value: Any, given: Given) -> Tree:
    quantised: Tree = {"quantize": "nf4"} if value == "qlora" else {}
    if value in ("lora", "qlora"):
        return {"method": "dora" if given.get("peft_use_dora") or given.get("use_dora") else "lora", **quantised}
    if value in ("full", None, ""):
        return {"method": "full"}
    if value == "oft":
        return {"method": "oft"}
    raise LorakitError(f"{value} is not a method of lorakit (`lorakit methods` lists them)")


def _stage(value: Any, _: Given) -> Tree:
    if value == "pt":
        return {"data.format": "text"}
    if value != "sft":
        raise LorakitError(f"{value}: preferences and rewards; only supervised fine-tuning is converted")
    return {}


def _bits(value: Any, given: Given) -> Tree:
    few = {4: str(given.get("quantization_type", "nf4")), 8: "int8"}.get(int(value)) if value else None
    if value and few is None:
        raise LorakitError(f"{value} bits; there are 4 (nf4, fp4) and 8 (int8)")
    return {"quantize": few} if few else {}


def _template(value: Any, _: Given) -> Tree:
    if value in (None, "", "tokenizer_default", "default", "jinja"):
        return {}
    if isinstance(value, str) and ("{" in value or value.endswith((".jinja", ".j2"))):
        return {"data.template": value}
    raise LorakitError(
        f'the model\'s own chat template is used instead of the one called "{value}"; another: data.template'
    )


def _new_tokens(value: Any, _: Given) -> Tree:
    if not isinstance(value, list):
        raise LorakitError("the names of the model's own special tokens; new ones are a list, data.special_tokens")
    return {"data.special_tokens": value}


def _groups(value: Any, _: Given) -> Tree:
    rates = {pattern: float(group["lr"]) for group in value for pattern in group["modules"]}
    return {f"train.rates.{pattern}": rate for pattern, rate in rates.items()}


_FORMATS = {
    "completion": "text",
    "chat_template": "messages",
    "sharegpt": None,
    "alpaca": None,
    "chatml": "messages",
}
"""Axolotl's types of rows as `data.format`; None: it is found by the columns."""


def _sources(ours: str, sources: Sequence[Tree]) -> Tree:
    """Sources of rows as options: what all have alike is said once, and else each says its own."""
    own = [{key: value for key, value in one.items() if key != "path"} for one in sources]
    if all(one == own[0] for one in own) and ours == "data.train":
        places = [one["path"] for one in sources]
        return {ours: places if len(places) > 1 else places[0], **{f"data.{key}": one for key, one in own[0].items()}}
    listed = [one if len(one) > 1 else one["path"] for one in sources]
    return {ours: listed if len(listed) > 1 or isinstance(listed[0], dict) else listed[0]}


def _datasets(ours: str) -> Callable[[Any, Given], Tree]:
    """Axolotl's list of data sets: their places, and how their rows are read."""

    def read(value: Any, _: Given) -> Tree:
        found: list[Tree] = []
        for one in ({"path": one} if isinstance(one, str) else one for one in value):
            kind = one.get("type", "alpaca")
            kind = kind if isinstance(kind, str) else "custom"
            form = kind.partition(".")[0].partition(":")[0]
            if form not in _FORMATS:
                raise LorakitError(f"rows of type {kind}; see docs/data.md for the forms that are read")
            columns = {"text": one["field"]} if "field" in one else {}
            if one.get("field_messages", "messages") != "messages":
                columns["messages"] = one["field_messages"]
            own = {"format": _FORMATS[form], "columns": columns, "subset": one.get("name"), "split": one.get("split")}
            files = one.get("data_files") or one["path"]
            for file in files if isinstance(files, list) else [files]:
                found.append({"path": file, **{key: value for key, value in own.items() if value}})
        return _sources(ours, found)

    return read


_ALPACA = {"instruction": "prompt", "input": "query", "output": "response"}
"""Our columns of an Alpaca row, and the entries by which LLaMA-Factory names them; each is called as ours by default."""


def _named_datasets(ours: str) -> Callable[[Any, Given], Tree]:
    """LLaMA-Factory's data sets by name, which a dataset_info.json explains."""

    def read(value: Any, given: Given) -> Tree:
        folder = Path(str(given.get("dataset_dir", "data")))
        listing = folder / "dataset_info.json"
        known = read_json(listing, "init --from") if listing.is_file() else {}
        found: list[Tree] = []
        for name in _listed(value):
            entry = known.get(name, {})
            place = folder / entry["file_name"] if "file_name" in entry else entry.get("hf_hub_url") or name
            if not entry and not Path(name).exists() and listing.is_file():
                raise LorakitError(f"{name} is not in {listing}")
            named = entry.get("columns", {})
            columns = {our: named[their] for our, their in _ALPACA.items() if named.get(their, our) != our}
            if entry.get("formatting") == "sharegpt" and named.get("messages", "conversations") != "conversations":
                columns = {"conversations": named["messages"]}
            if entry.get("tags") or entry.get("ranking"):
                raise LorakitError(
                    f"{name} has tags or a ranking of its own; see docs/data.md for the forms that are read"
                )
            own = {"columns": columns, "subset": entry.get("subset"), "split": entry.get("split")}
            found.append({"path": str(place), **{key: value for key, value in own.items() if value}})
        return _sources(ours, found)

    return read


CONVERTED: dict[str, Callable[[Any, Given], Tree]] = {
    "adapter": _adapter, "finetuning_type": _adapter, "stage": _stage,
    "peft_use_dora": _flag(method="dora"), "use_dora": _flag(method="dora"), "pissa_init": _flag(init="pissa"),
    "load_in_4bit": _flag(quantize="nf4"), "load_in_8bit": _flag(quantize="int8"),
    "quantization_bit": _bits, "quantization_type": lambda value, given: {}, "double_quantization": lambda value, given: {},
    "lora_target_modules": _targets, "lora_target": _targets, "lora_target_linear": _flag(target_modules="all-linear"),
    "additional_target": lambda value, given: {"modules_to_save": _listed(value)},
    "datasets": _datasets("data.train"), "test_datasets": _datasets("data.evaluation"),
    "pretraining_dataset": _datasets("data.train"),
    "dataset": _named_datasets("data.train"), "eval_dataset": _named_datasets("data.evaluation"),
    "template": _template, "chat_template": _template,
    "chat_template_jinja": lambda value, given: {"data.template": value} if value else {},
    "tokens": _new_tokens,
    "enable_thinking": lambda value, given: {"data.template_arguments.enable_thinking": value},
    "train_on_inputs": lambda value, given: {"data.completion_only_loss": not value},
    "train_on_prompt": lambda value, given: {"data.completion_only_loss": not value},
    "shuffle_merged_datasets": lambda value, given: {} if value else {"data.shuffle_seed": None},
    "optimizer": _choose(OPTIMIZERS, "train.optimizer"), "optim": _choose(OPTIMIZERS, "train.optimizer"),
    "use_galore": _flag(train__optimizer="galore"), "galore_rank": lambda value, given: {"train.optimizer_options.rank": value},
    "max_steps": lambda value, given: {"train.max_steps": value} if value > 0 else {},
    "use_muon": _flag(train__optimizer="muon"), "optim_args": lambda value, given: {"train.optimizer_options": value},
    "adam_beta1": _betas, "adam_beta2": _betas,
    "adam_epsilon": lambda value, given: {"train.optimizer_options.eps": float(value)},
    "lr_scheduler": _scheduler, "lr_scheduler_type": _scheduler,
    "cosine_min_lr_ratio": lambda value, given: {"train.scheduler_options.min_lr_rate": value},
    "lr_groups": _groups, "loraplus_lr_embedding": lambda value, given: {"train.rates.embed_tokens": float(value)},
    "embedding_lr": lambda value, given: {"train.rates.embed_tokens": float(value)},
    "bf16": _precision("bf16"), "bfloat16": _precision("bf16"), "pure_bf16": _precision("bf16"),
    "fp16": _precision("fp16"), "float16": _precision("fp16"),
    "gradient_checkpointing": _flag(train__memory="small"),
    "disable_gradient_checkpointing": lambda value, given: {} if value else {"train.memory": "small"},
    "torch_compile": lambda value, given: {"train.compile": "auto" if value else "off"},
    "report_to": lambda value, given: {} if value in ("none", [], None) else {"train.report_to": _listed(value)},
    "use_wandb": _flag(train__report_to=["wandb"]), "use_tensorboard": _flag(train__report_to=["tensorboard"]),
    "eval_steps": _steps("train.eval_steps"), "save_steps": _steps("train.save_steps"),
    "resume_from_checkpoint": lambda value, given: {"train.resume": value} if value else {},
}  # fmt: skip
"""Keys whose values are made into others."""

PROGRAMS = {
    "Axolotl": (
        "base_model",
        {"datasets", "micro_batch_size", "sequence_len", "num_epochs", "adapter", "pretraining_dataset"},
    ),
    "LLaMA-Factory": (
        "model_name_or_path",
        {"stage", "finetuning_type", "dataset", "cutoff_len", "template", "do_train"},
    ),
}
"""Program -> the key for the model, and others of which a file has one."""


def program_of(tree: Mapping[str, Any]) -> str | None:
    """The program that a file was written for; None for one of lorakit's, or of none that is known."""
    for program, (model, others) in PROGRAMS.items():
        if model in tree and "model" not in tree and others & tree.keys():
            return program
    return None


def converted(path: Path) -> tuple[str, Tree, list[str]]:
    """A file of another program as lorakit's options.

    Returns:
        The program, the tree of options, and a line for every key that was left out, with the reason.

    Raises:
        LorakitError: the file cannot be read, or is of no known program.
    """
    given, _ = parse_document(read_text(path, "init --from"), str(path))
    program = program_of(given)
    if program is None:
        raise LorakitError(
            f"init --from: {path} is no file of {' or '.join(PROGRAMS)}: expected base_model or model_name_or_path with "
            f"{', '.join(sorted(PROGRAMS['Axolotl'][1]))}, ...; found {', '.join(given) or 'nothing'}"
        )
    flat: Tree = {}
    left: list[str] = []
    for key, value in given.items():
        if value is None and key not in ("adapter",):
            continue
        try:
            flat |= CONVERTED[key](value, given) if key in CONVERTED else _plain(key, value)
        except (LorakitError, KeyError, TypeError, ValueError) as problem:
            said = str(problem) if isinstance(problem, LorakitError) else f"{value!r} is in a form that is not known"
            left.append(f"{key}: {said}")
    if program == "Axolotl" and "adapter" not in given:
        flat["method"] = "full"
    if flat.get("method") == "full":  # a file may keep what it had for LoRA
        for key in ("rank", "alpha", "dropout", "rslora", "target_modules", "init"):
            flat.pop(key, None)
    if given.get("wandb_project"):
        flat["train.report_to"] = ["wandb"]
    return program, _nested(flat), left


def _plain(key: str, value: Any) -> Tree:
    if key in NEEDLESS or (key in WITHOUT and value in (False, "", [], {})):
        return {}
    if key in WITHOUT:
        raise LorakitError(WITHOUT[key])
    if key not in RENAMED:
        if value in (False, "", [], {}):
            return {}
        raise LorakitError("has no equivalent")
    if isinstance(value, str) and re.fullmatch(r"\d+(_\d+)+", value):  # as YAML 1.1 writes large numbers
        value = int(value)
    return {RENAMED[key]: value}


def _nested(flat: Tree) -> Tree:
    tree: Tree = {}
    for name, value in flat.items():
        section, dot, rest = name.partition(".")
        if not dot:
            tree[section] = value
            continue
        option, dot, inner = rest.partition(".")
        target = tree.setdefault(section, {})
        if dot:
            target.setdefault(option, {})[inner] = value
        else:
            target[option] = value
    return tree
