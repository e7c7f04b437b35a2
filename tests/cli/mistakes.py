"""A folder of what people get wrong: broken models, adapters, rows and run files, made once for the table of mistakes."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import SPECIAL, WORDS, words_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk

WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "lorakit.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
ROWS = [
    {"prompt": f"{article} {thing} was {word}", "completion": answer}
    for article in ("a", "the")
    for thing in ("film", "play", "book", "song")
    for word, answer in (("good", "yes"), ("bad", "no"))
]
RUN = """model: weightless
rank: 4
data: {train: d/rows.jsonl}
train: {batch_size: 4, learning_rate: 1e-2, precision: fp32, compile: 'off', max_steps: 2, output: out}
"""
AXOLOTL = """base_model: base
adapter: lora
lora_r: 8
sequence_len: 512
micro_batch_size: 2
"""


def llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A tiny random Llama with its tokenizer, saved."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2} | changes
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        eos_token_id=1, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return model


def edited(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file of a folder."""
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def retensored(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSONL."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def turns(*messages: tuple[str, Any]) -> dict[str, Any]:
    """A row of messages."""
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def build(root: Path) -> None:
    """Everything, below `root`."""
    model = llama(root / "base")
    adapter = lk.attach(model, lk.LoRA(rank=4), name="good")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    adapter.save(root / "good", base=str(root / "base"))
    llama(root / "other", hidden_size=16, intermediate_size=32)
    models(root)
    adapters(root)
    rows(root / "d")
    files(root)


def models(root: Path) -> None:
    """Bases, each broken in one way."""

    def copy(name: str) -> Path:
        shutil.copytree(root / "base", root / name)
        return root / name

    (copy("weightless") / "model.safetensors").write_bytes(b"never read")
    file = copy("m-cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    retensored(copy("m-nan") / "model.safetensors", lambda tensors: tensors[Q_PROJ].fill_(float("nan")))
    retensored(copy("m-lacks") / "model.safetensors", lambda tensors: tensors.pop(Q_PROJ))
    retensored(copy("m-shape") / "model.safetensors", lambda tensors: tensors.__setitem__(Q_PROJ, torch.ones(3, 3)))
    for name, text in {
        "m-unknown": '{"model_type": "nothing-known"}', "m-typeless": "{}", "m-text": "{", "m-list": "[1]", "m-void": "",
    }.items():  # fmt: skip
        (copy(name) / "config.json").write_text(text)
    edited(copy("m-wide"), "config.json", lambda values: values.update(hidden_size="wide"))
    edited(copy("m-headless"), "config.json", lambda values: values.update(num_attention_heads=0))
    for file in copy("m-mute").glob("token*"):
        file.unlink()
    (copy("m-words") / "tokenizer.json").write_text('{"version": ')
    (root / "m-empty").mkdir()


def adapters(root: Path) -> None:
    """Adapters, each broken in one way; without lorakit.json where its digests would tell first."""

    def copy(name: str, own: bool = False) -> Path:
        shutil.copytree(root / "good", root / name)
        if not own:
            (root / name / OWN).unlink()
        return root / name

    def first(tensors: dict[str, Tensor]) -> str:
        return sorted(tensors)[0]

    retensored(copy("a-nan") / WEIGHTS, lambda tensors: tensors[first(tensors)].fill_(float("nan")))
    retensored(copy("a-lacks") / WEIGHTS, lambda tensors: tensors.pop(first(tensors)))
    retensored(
        copy("a-more") / WEIGHTS,
        lambda tensors: tensors.__setitem__(
            "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", torch.ones(4, 24)
        ),
    )
    retensored(copy("a-edited", own=True) / WEIGHTS, lambda tensors: tensors[first(tensors)].mul_(2))
    save_file({}, copy("a-none") / WEIGHTS)
    edited(copy("a-rank"), CONFIG, lambda values: values.update(r=8))
    edited(copy("a-kind"), CONFIG, lambda values: values.update(peft_type="NOTHING"))
    edited(copy("a-kindless"), CONFIG, lambda values: values.pop("peft_type"))
    edited(copy("a-words"), CONFIG, lambda values: values.update(r="two", target_modules=5))
    edited(copy("a-alpha"), CONFIG, lambda values: values.update(lora_alpha="much"))
    edited(copy("a-baseless"), CONFIG, lambda values: values.update(base_model_name_or_path=None))
    edited(copy("a-gone"), CONFIG, lambda values: values.update(base_model_name_or_path="/nowhere/base"))
    for name, text in {
        "a-text": b"{not",
        "a-utf16": "{}".encode("utf-16"),
        "a-latin": b'{"a": "\xe9"}',
        "a-list": b"[]",
    }.items():
        (copy(name) / CONFIG).write_bytes(text)
    for name, text in {"a-own": "{", "a-own-list": "[]", "a-own-format": '{"format": "x"}'}.items():
        (copy(name) / OWN).write_text(text)
    whole = (root / "good" / WEIGHTS).read_bytes()
    for name, raw in {"a-cut": whole[:-20], "a-head": whole[:5], "a-bytes": b"\xff" * 30, "a-empty": b""}.items():
        (copy(name) / WEIGHTS).write_bytes(raw)
    (copy("a-tensorless") / WEIGHTS).unlink()
    (copy("a-pickle") / WEIGHTS).rename(root / "a-pickle" / "adapter_model.bin")
    (copy("a-folder") / WEIGHTS).unlink()
    (root / "a-folder" / WEIGHTS).mkdir()
    (copy("a-link") / WEIGHTS).unlink()
    (root / "a-link" / WEIGHTS).symlink_to("gone")
    (copy("a-bare") / CONFIG).unlink()
    (copy("a-template") / "chat_template.jinja").write_text("{% for m in messages %}")
    for name in ("go od", 'gö"od'):
        copy(name, own=True)
    (root / "linked").symlink_to("good")
    (root / "unfinished" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    shutil.copy(root / "good" / WEIGHTS, root / "alone.safetensors")


def rows(folder: Path) -> None:
    """Rows in every wrong form."""
    folder.mkdir()
    text = lines(ROWS)
    question = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS]
    written: dict[str, str | bytes] = {
        "rows.jsonl": text, "copy.jsonl": text, "part.jsonl": lines(ROWS[:3]), "crlf.jsonl": text.replace("\n", "\r\n"),
        "held.jsonl": lines([{"prompt": "it was fine", "completion": "yes"}, {"prompt": "it was dull", "completion": "no"}]),
        "empty.jsonl": "", "blank.jsonl": "\n\n\n", "bom.jsonl": b"\xef\xbb\xbf" + text.encode(),
        "broken.jsonl": lines(ROWS[:1]) + '{"prompt": \n' + lines(ROWS[1:2]),
        "utf16.jsonl": text.encode("utf-16"), "utf16le.jsonl": text.encode("utf-16-le"), "utf32.jsonl": text.encode("utf-32"),
        "latin.jsonl": '{"prompt": "café", "completion": "yes"}\n'.encode("latin-1"), "zeros.jsonl": b"\0" * 400,
        "list.jsonl": json.dumps(ROWS), "pretty.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "cut.json": json.dumps(ROWS)[:-20], "data.json": json.dumps({"data": ROWS}, indent=1), "numbers.json": "[1, 2]",
        "string.json": '"x"', "object.json": '{"a": 1}',
        "numeric.jsonl": lines([{"prompt": 1, "completion": 2}] * 12),
        "null.jsonl": lines([{"prompt": "a", "completion": None}] * 12),
        "space.jsonl": lines([{"prompt": "a", "completion": " "}]), "nan.jsonl": '{"prompt": "a", "completion": NaN}\n',
        "capitals.jsonl": lines({key.upper(): value for key, value in row.items()} for row in ROWS),
        "title.jsonl": lines({key.title(): value for key, value in row.items()} for row in ROWS),
        "question.jsonl": lines(question), "typo.jsonl": lines({"promt": "a", "completion": "yes"} for _ in range(3)),
        "foreign.jsonl": lines([{"colour": "red", "size": "big"}]),
        "both.jsonl": lines([*ROWS[:2], turns(("user", "a"), ("assistant", "yes"))]),
        "humna.jsonl": lines([turns(("humna", "a"), ("assistant", "yes"))]),
        "uesr.jsonl": lines([turns(("uesr", "a"), ("assistant", "yes"))]),
        "only-user.jsonl": lines([turns(("user", "a"))]), "roleless.jsonl": lines([{"messages": [{"content": "a"}]}]),
        "message.jsonl": lines([{"messages": "hello"}]), "silent.jsonl": lines([{"messages": []}]),
        "image.jsonl": lines([turns(("user", [{"type": "image", "url": "x"}]), ("assistant", "yes"))]),
        "preference.jsonl": lines([{"prompt": "a", "chosen": "yes", "rejected": "no"}]),
        "kto.jsonl": lines([{"prompt": "a", "completion": "yes", "label": True}]),
        "class.jsonl": lines([{"text": "good", "label": "a"}] * 8), "one.jsonl": lines(ROWS[:1]),
        "same.jsonl": lines(ROWS[:1] * 8), "special.jsonl": lines([{"prompt": "a", "completion": "yes <end> no"}] * 2),
        "long.jsonl": lines([{"prompt": "good " * 3000, "completion": "yes"}] * 2),
        "semicolon.csv": "prompt;completion\na film;yes\nthe play;no\n", "pipe.csv": "prompt|completion\na|yes\nb|no\n",
        "tab.csv": "prompt\tcompletion\na\tyes\nb\tno\n", "headless.csv": "the film was good,yes\nthe play was bad,no\n",
        "ragged.csv": "prompt,completion\na,yes\nb\n", "header.csv": "prompt,completion\n",
        "quote.csv": 'prompt,completion\n"a,yes\n', "twice.csv": "prompt,prompt\na,b\n",
        "fake.parquet": b"PAR1 no", "fake.arrow": b"no", "fake.jsonl.gz": b"no",
        "half.jsonl.gz": gzip.compress(text.encode())[:-20], "rows.jsonl.zip": b"PK", "rows.xlsx": b"PK", "rows.pdf": b"%PDF",
        "rows": text,
    }  # fmt: skip
    for name, content in written.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "void").mkdir()
    (folder / "my rows ü").mkdir()
    shutil.copy(folder / "rows.jsonl", folder / "my rows ü" / "it's.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "linked.jsonl").symlink_to("rows.jsonl")


def files(root: Path) -> None:
    """Run files, and places to write that are no places."""
    written: dict[str, str | bytes] = {
        "run.yaml": RUN, "whole.yaml": RUN.replace("weightless", "base"), "y-tab.yaml": "model: base\n\trank: 4\n",
        "y-empty.yaml": "", "y-typo.yaml": "modle: base\n", "y-list.yaml": "- model: base\n", "y-text.yaml": "model\n",
        "y-strange.yaml": "model: base\ncolour: red\nlr: 1e-4\n",
        "y-flat.yaml": "model: base\nlearning_rate: 1e-4\ndata: {train: d/rows.jsonl}\n",
        "y-twice.yaml": "model: base\nmodel: other\n", "y-dataless.yaml": "model: base\n", "y-null.yaml": "model: null\n",
        "y-string.yaml": "model: base\ndata: d/rows.jsonl\n", "y-alias.yaml": "model: *base\n",
        "y-two.yaml": "model: a\n---\nmodel: b\n",
        "y-python.yaml": "model: !!python/object:os.system x\n", "y-utf16.yaml": "model: base\n".encode("utf-16"),
        "y-bytes.yaml": b"\x00\x01\xff", "axolotl.yml": AXOLOTL, "a file": "mine", "latin.txt": b"caf\xe9\n", "empty.txt": "",
    }  # fmt: skip
    for name, content in written.items():
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (root / "full").mkdir()
    for name in ("README.md", "train.yaml"):
        (root / "full" / name).write_text("mine")
