"""A model folder small enough for the command line to load in a moment, rows for it, and a way to call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lorakit.cli import app

WORDS = ["good", "bad", "fine", "dull", "film", "play", "book", "song", "a", "the", "is", "it", "was"]
WORDS += ["really", "very", "so", "yes", "no", "what"]
SPECIAL = ["<unk>", "<end>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<end> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def words_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions: a good thing is "yes", a bad one "no"."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for i in range(40):
        word, answer = [("good", "yes"), ("bad", "no")][i % 2]
        prompt = f"{['the', 'a'][i // 2 % 2]} {['film', 'play', 'book', 'song'][i // 3 % 4]} was {word}"
        lines.append(json.dumps({"prompt": prompt, "completion": answer}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def config(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over these rows."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(
        f"""
model: {base}
rank: 8
alpha: 32
data: {{train: {rows}, evaluation_size: 10}}
train: {{batch_size: 4, learning_rate: 1e-2, precision: fp32, compile: 'off', max_steps: 120, logging_steps: 20}}
evaluate: {{answers: score, choices: ["yes", "no"]}}
"""
    )
    return path


@pytest.fixture(scope="session")
def adapter(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder trained by the command line."""
    folder = tmp_path_factory.mktemp("adapters") / "yesno"
    result = call("train", str(config), "--train.output", str(folder))
    assert result.exit_code == 0, result.output
    return folder


def call(*arguments: str, stdin: str | None = None) -> Result:
    """Run the command line in this process, as a user would in a shell."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


@pytest.fixture
def lorakit() -> Callable[..., Result]:
    """The command line as a function."""
    return call
