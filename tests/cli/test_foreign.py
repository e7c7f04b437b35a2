"""`lorakit init --from`: files in the manner of Axolotl and LLaMA-Factory become runs that train; the rest is listed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import lorakit as lk
from lorakit.train.config.flags import Names
from lorakit.train.config.foreign import CONVERTED, NEEDLESS, OPTIMIZERS, RENAMED, WITHOUT, converted
from lorakit.train.config.run import from_tree, load_config

Run = Callable[..., Result]

AXOLOTL = """
base_model: {base}
model_type: AutoModelForCausalLM
load_in_4bit: false
datasets:
  - path: {alpaca}
    ds_type: json
    type: alpaca
val_set_size: 0.1
output_dir: {out}/axolotl
adapter: lora
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
peft_use_dora: true
sequence_len: 64
sample_packing: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch_fused
adam_beta2: 0.95
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 0.0002
lr_groups: [{{name: last, modules: [layers.1], lr: 1e-3}}]
train_on_inputs: false
bf16: false
gradient_checkpointing: true
warmup_steps: 2
evals_per_epoch: 4
weight_decay: 0.01
neftune_noise_alpha: 5
flash_attention: true
deepspeed: deepspeed_configs/zero2.json
special_tokens:
  pad_token: "<pad>"
plugins: [axolotl.integrations.liger.LigerPlugin]
shiny_new_key: 7
"""

LLAMA_FACTORY = """
### model
model_name_or_path: {base}
trust_remote_code: false
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
pissa_init: true
### dataset
dataset: own
dataset_dir: {folder}
template: llama3
cutoff_len: 64
max_samples: 24
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: {out}/factory
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
### train
per_device_train_batch_size: 4
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
num_train_epochs: 1.0
max_steps: -1
lr_scheduler_type: cosine_with_restarts
warmup_ratio: 0.1
bf16: true
optim: lion_pytorch
train_on_prompt: true
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 4
dpo_beta: 0.1
"""


@pytest.fixture
def places(base: Path, tmp_path: Path) -> dict[str, Path]:
    rows = [{"instruction": f"the film was {word}", "input": "", "output": answer}
            for word, answer in [("good", "yes"), ("bad", "no")] * 12]  # fmt: skip
    alpaca = tmp_path / "own.json"
    alpaca.write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"own": {"file_name": "own.json"}}))
    return {"base": base, "alpaca": alpaca, "folder": tmp_path, "out": tmp_path / "out"}


def initialised(lorakit: Run, places: dict[str, Path], text: str, suffix: str = ".yml") -> tuple[Path, str]:
    source, target = places["folder"] / f"theirs{suffix}", places["folder"] / "ours.yaml"
    source.write_text(text.format(**places))
    refused = lorakit("train", str(source))
    program = "Axolotl" if "micro_batch_size" in text else "LLaMA-Factory"
    assert refused.exit_code == 2
    assert f"is a file of {program}; `lorakit init --from {source} -o run.yaml`" in " ".join(refused.output.split())
    done = lorakit("init", "--from", str(source), "-o", str(target))
    assert done.exit_code == 0, done.output
    return target, done.output


def trained(lorakit: Run, run: Path) -> None:
    done = lorakit("train", str(run), "--train.max-steps", "3", "--train.compile", "off", "--train.precision", "fp32")
    assert done.exit_code == 0, done.output


def test_a_file_of_axolotl_trains_and_what_has_no_equivalent_is_listed(lorakit: Run, places: dict[str, Path]) -> None:
    run, said = initialised(lorakit, places, AXOLOTL)
    config = load_config(run)
    inner: Any = config.method.inner
    assert isinstance(config.method, lk.DoRA)
    assert (inner.rank, inner.alpha, inner.dropout) == (4, 8.0, 0.05)
    assert config.target_modules == ("q_proj", "v_proj")
    train, data = config.train, config.data
    assert (train.scheduler, train.scheduler_options) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (train.optimizer, train.optimizer_options) == ("adamw", {"betas": [0.9, 0.95]})
    assert (train.batch_size, train.gradient_accumulation, train.warmup, train.memory) == (2, 2, 2, "small")
    assert (train.neftune, train.rates, train.learning_rate) == (5.0, {"layers.1": 1e-3}, 2e-4)
    assert (data.max_length, data.evaluation_size, data.completion_only_loss) == (64, 0.1, True)
    left = [line.partition("left out: ")[2] for line in said.splitlines() if line.startswith("left out: ")]
    assert [line.partition(":")[0] for line in left] == [
        "evals_per_epoch",
        "deepspeed",
        "special_tokens",
        "shiny_new_key",
    ]
    assert all(f"# left out: {line}" in run.read_text() for line in left), "the file says it too"
    trained(lorakit, run)


def test_a_file_of_llama_factory_trains(lorakit: Run, places: dict[str, Path]) -> None:
    run, said = initialised(lorakit, places, LLAMA_FACTORY)
    config = load_config(run)
    assert config.method == lk.LoRA(rank=4)
    assert (config.init.name, config.target_modules, config.overwrite) == ("pissa", "all-linear", True)
    assert config.data.train == str(places["folder"] / "own.json")
    assert (config.data.limit, config.data.completion_only_loss) == (24, False)
    train = config.train
    assert (train.optimizer, train.scheduler, train.warmup) == ("lion", "cosine_with_restarts", 0.1)
    assert (train.precision, train.max_steps, train.save_steps, train.eval_steps) == ("bf16", None, 500, 4)
    left = [line.split(":")[1].strip() for line in said.splitlines() if line.startswith("left out: ")]
    assert left == ["template", "dpo_beta"]
    trained(lorakit, run)


def test_json_and_full_fine_tuning(lorakit: Run, places: dict[str, Path]) -> None:
    given = {"model_name_or_path": "{base}", "stage": "sft", "finetuning_type": "full", "lora_rank": 8, "dataset": "own",
             "dataset_dir": "{folder}", "output_dir": "{out}", "quantization_bit": None, "use_galore": True}  # fmt: skip
    text = json.dumps(given).replace("{", "{{").replace("}", "}}")
    for name in ("base", "folder", "out"):
        text = text.replace("{{" + name + "}}", "{" + name + "}")
    run, said = initialised(lorakit, places, text, ".json")
    config = load_config(run)
    assert isinstance(config.method, lk.Full)
    assert config.train.optimizer == "galore"
    assert "left out" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: tiny\n", "is no file of Axolotl or LLaMA-Factory"),
        ("base_model: tiny\nadapter: lora\ndatasets: [{path: a.json, type: input_output}]\n", "data.train is missing"),
        (
            "base_model: m\nadapter: lora\nlearning_rate: fast\ndatasets: [a.json]\n",
            "train.learning_rate: expected a number",
        ),
        ("base_model: m\n  adapter: lora\n", "this is not YAML"),
    ],
)
def test_what_cannot_be_converted_is_said(lorakit: Run, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "theirs.yml").write_text(textwrap.dedent(text))
    done = lorakit("init", "--from", str(tmp_path / "theirs.yml"), "-o", str(tmp_path / "ours.yaml"))
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "ours.yaml").exists()


def test_the_tables_name_options_that_exist() -> None:
    names = Names()
    for ours in RENAMED.values():
        names.path(ours, "the table")
    assert not set(NEEDLESS) & set(WITHOUT)
    assert not set(CONVERTED) & set(WITHOUT)
    from lorakit.train.check import check_options
    from lorakit.train.config.run import TrainOptions

    for name in set(OPTIMIZERS.values()):
        if "paged" not in name:
            check_options(TrainOptions(optimizer=name))


def test_data_sets_that_differ_keep_what_is_their_own(tmp_path: Path) -> None:
    """A subset, a split or a type of one of them is not that of all."""
    theirs = tmp_path / "theirs.yml"
    theirs.write_text(
        "base_model: m\nmicro_batch_size: 2\nadapter: lora\ndatasets:\n"
        "  - {path: org/chats, type: chat_template, field_messages: turns, name: en, split: train}\n"
        "  - {path: org/notes, type: completion, field: body, name: de}\n"
        "  - plain.jsonl\n"
    )
    _, tree, left = converted(theirs)
    assert left == []
    assert tree["data"]["train"] == [
        {"path": "org/chats", "format": "messages", "columns": {"messages": "turns"}, "subset": "en", "split": "train"},
        {"path": "org/notes", "format": "text", "columns": {"text": "body"}, "subset": "de"},
        "plain.jsonl",
    ]
    (tmp_path / "dataset_info.json").write_text(
        json.dumps(
            {
                "one": {"file_name": "one.json", "columns": {"prompt": "ask", "query": "more", "response": "answer"}},
                "two": {
                    "hf_hub_url": "org/two",
                    "subset": "en",
                    "formatting": "sharegpt",
                    "columns": {"messages": "log"},
                },
                "pairs": {"file_name": "pairs.json", "ranking": True},
            }
        )
    )
    theirs.write_text(f"model_name_or_path: m\nstage: sft\ndataset_dir: {tmp_path}\ndataset: one,two\n")
    _, tree, left = converted(theirs)
    assert left == []
    assert tree["data"]["train"] == [
        {
            "path": str(tmp_path / "one.json"),
            "columns": {"instruction": "ask", "input": "more", "output": "answer"},
        },
        {"path": "org/two", "columns": {"conversations": "log"}, "subset": "en"},
    ]
    from_tree(tree, str(theirs))
    theirs.write_text(f"model_name_or_path: m\nstage: sft\ndataset_dir: {tmp_path}\ndataset: pairs\n")
    assert "ranking" in " ".join(converted(theirs)[2])


def test_what_is_left_out_is_told_also_where_the_rest_is_no_run(lorakit: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.yml"
    theirs.write_text(
        "base_model: m\nmicro_batch_size: 2\nadapter: lora\nsequence_len: 500_000\n"
        "tokens: {pad_token: '<pad>'}\ndatasets: [{path: pairs.jsonl, type: chatml.intel.of.nobody}, {path: x, type: dpo}]\n"
    )
    _, tree, left = converted(theirs)
    assert tree["data"] == {"max_length": 500_000}
    assert [line.partition(":")[0] for line in left] == ["tokens", "datasets"]
    done = lorakit("init", "--from", str(theirs), "-o", str(tmp_path / "ours.yaml"))
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert "left out: datasets: rows of type dpo" in said
    assert "data.train is missing" in said
    assert not (tmp_path / "ours.yaml").exists()
