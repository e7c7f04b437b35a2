"""`predict`, `merge` and `verify` of an adapter with a task of its own: what its folder records is enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from click.testing import Result

ROWS = [
    {"tokens": f"the {word} {thing} was so {word}".split(), "ner_tags": ["O", "B-Q", "O", "O", "O", "B-Q"]}
    for word in ("good", "bad", "fine", "dull")
    for thing in ("film", "play", "book", "song")
]


@pytest.fixture(scope="module")
def tagger(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny BERT, rows for it, and where its adapter goes."""
    root = tmp_path_factory.mktemp("tagger")
    tf.AutoTokenizer.from_pretrained(base).save_pretrained(root / "bert")
    torch.manual_seed(0)
    size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.BertModel(tf.BertConfig(vocab_size=32, pad_token_id=0, **size)).save_pretrained(root / "bert")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = [{"tokens": row["tokens"]} for row in ROWS[:5]]
    (root / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return root / "bert", root / "rows.jsonl", root / "asked.jsonl"


def test_a_tagger_is_trained_asked_merged_and_verified(
    tagger: tuple[Path, Path, Path], lorakit: Callable[..., Result], tmp_path: Path
) -> None:
    base, rows, asked = tagger
    out, merged = tmp_path / "tagger", tmp_path / "merged"
    short = (
        "--task",
        "token-cls",
        "--train.max-steps",
        "30",
        "--train.learning-rate",
        "1e-2",
        "--train.precision",
        "fp32",
    )
    made = lorakit("train", "--model", str(base), "--data.train", str(rows), "--data.evaluation-size", "4", *short,
                   "--train.output", str(out), "--train.compile", "off")  # fmt: skip
    assert made.exit_code == 0, made.output
    card = (out / "README.md").read_text()
    assert "AutoModelForTokenClassification" in card
    assert "token-cls" in card
    given = lorakit("predict", str(out), str(asked), "--output", str(tmp_path / "given.jsonl"))
    assert given.exit_code == 0, given.output
    answers = [json.loads(line) for line in (tmp_path / "given.jsonl").read_text().splitlines()]
    assert [one["tokens"] for one in answers] == [row["tokens"] for row in ROWS[:5]]
    assert [one["prediction"] for one in answers] == [row["ner_tags"] for row in ROWS[:5]]
    (tmp_path / "texts.jsonl").write_text('{"text": "a film"}\n')
    wrong = lorakit("predict", str(out), str(tmp_path / "texts.jsonl"))
    assert wrong.exit_code == 2, wrong.output
    assert "task token-cls needs tokens" in wrong.output
    report = lorakit("eval", str(out), "--json")
    assert report.exit_code == 0, report.output
    assert json.loads(report.stdout)["tagger"]["f1"] == 1.0
    assert lorakit("merge", str(base), str(out), "--output", str(merged)).exit_code == 0
    model = tf.AutoModelForTokenClassification.from_pretrained(merged)
    tokenizer = tf.AutoTokenizer.from_pretrained(merged)
    best = model(**tokenizer(ROWS[0]["tokens"], is_split_into_words=True, return_tensors="pt")).logits[0].argmax(-1)
    assert [model.config.id2label[place] for place in best.tolist()] == ROWS[0]["ner_tags"]
    verified = lorakit("verify", str(out), "--prompt", "the film was good")
    assert verified.exit_code == 0, verified.output
