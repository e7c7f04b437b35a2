"""Laws of every task of the table: a new row joins by itself, and needs a base and rows here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.models.tasks import TASKS as LOADERS
from lorakit.models.tasks import check_task, task_of_base
from lorakit.train import train
from lorakit.train.config.run import DataOptions, EvaluateOptions, TrainConfig, TrainOptions
from lorakit.train.data.reading import load_rows
from lorakit.train.run import attach_arguments, load_for
from lorakit.train.tasks import TASKS, PaddedTask, check_columns
from lorakit.train.tasks.seq2seq import decoder_inputs

WORDS = (
    "[PAD] [CLS] [SEP] [UNK] [MASK] good fine great bad poor awful the a film was and who where in home garden sun".split()  # noqa: SIM905
)
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")


def text(at: int) -> str:
    """Texts of unequal lengths, every second one with praise."""
    return f"the film was {(GOOD, BAD)[at % 2][at // 2 % 3]}" + " and a film" * (at % 4)


def question(at: int) -> dict[str, Any]:
    place = ("home", "garden")[at % 2]
    context = f"the sun was in the {place}" + " and a film" * (at % 11)
    return {
        "question": "where was the sun",
        "context": context,
        "answers": {"text": [place], "answer_start": [context.index(place)]},
    }


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal-lm": lambda at: {"text": text(at)},
    "seq-cls": lambda at: {"text": text(at), "label": ("praise", "blame")[at % 2]},
    "pair-cls": lambda at: {"premise": text(at), "hypothesis": text(at // 2), "label": ("same", "other")[at % 2]},
    "multi-label": lambda at: {"text": text(at), "labels": [["praise"], ["blame", "long"], []][at % 3]},
    "regression": lambda at: {"text": text(at), "label": 1.5 - at % 2},
    "reranker": lambda at: {"query": text(at // 2), "passage": text(at), "label": at % 2},
    "token-cls": lambda at: {
        "tokens": text(at).split(),
        "ner_tags": ["B-Q" if one in GOOD + BAD else "O" for one in text(at).split()],
    },
    "question-answering": question,
    "masked-lm": lambda at: {"text": text(at)},
    "seq2seq": lambda at: {"source": text(at), "target": "a film was " + ("good", "bad")[at % 2] + " and" * (at % 3)},
    "embeddings": lambda at: {"sentence1": text(at), "sentence2": text(at // 2), "score": float(at % 2)},
}
PADDED = sorted(name for name, one in TASKS.items() if isinstance(one, PaddedTask))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny BERT (with its MLM head) and a tiny BART."""
    root = tmp_path_factory.mktemp("bases")
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, eos_token="[SEP]", **names)
    torch.manual_seed(0)
    bert = tf.BertForMaskedLM(tf.BertConfig(**SMALL))
    bart = tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=len(WORDS), d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        )
    )  # fmt: skip
    for name, model in (("bert", bert), ("bart", bart)):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return {name: root / ("bart" if name == "seq2seq" else "bert") for name in TASKS}


def run_of(name: str, folders: dict[str, Path], tmp_path: Path, count: int = 16, **options: Any) -> TrainConfig:
    for file, rows in (("train", range(count)), ("held", range(count, count + 6))):
        lines = (json.dumps(ROWS[name](at)) + "\n" for at in rows)
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
    given = {"batch_size": 4, "learning_rate": 5e-3, "precision": "fp32", "compile": "off", "max_steps": 4, **options}
    return TrainConfig(
        model=str(folders[name]),
        task=name,
        method=lk.LoRA(rank=4),
        data=DataOptions(train=str(tmp_path / "train.jsonl"), evaluation=str(tmp_path / "held.jsonl")),
        train=TrainOptions(output=str(tmp_path / "out"), **given),
        evaluate=EvaluateOptions(max_new_tokens=8),
    )


def test_the_table_is_whole() -> None:
    options = set(get_args(TrainConfig.model_fields["task"].annotation))
    assert options == {"auto", *TASKS}
    assert set(TASKS) | {"features"} == set(LOADERS)
    assert set(ROWS) == set(TASKS), "a new task needs rows here"


def prepared(config: TrainConfig) -> tuple[Any, Any, Any, Any]:
    task = TASKS[config.task]
    rows = load_rows(config.data.train)
    check_columns(task, rows, config)
    classes = task.classes(rows, config)
    model, tokenizer = load_for(config, classes)
    adapter = lk.attach(model, config.method, **attach_arguments(config, model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return task, model, adapter, task.prepare(rows, tokenizer, config, classes).examples


@pytest.mark.parametrize("name", PADDED)
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Rows of unequal lengths and counts, the last micro-batch smaller."""
    config = run_of(name, folders, tmp_path, count=5)
    task, model, adapter, examples = prepared(config)
    path, some = task.path(model, config), [examples[at] for at in range(5)]
    items, found = float(path.count(some)), []
    for parts in ([some], [some[:2], some[2:4], some[4:]]):
        total = 0.0
        with path.opened(model):
            for part in parts:
                loss, _ = path.loss(model, part, num_items=items)
                loss.backward()
                total += float(loss)
        found.append((total, [p.grad.clone() for p in adapter.parameters() if p.grad is not None]))
        model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in found[0][1])
    for whole, summed in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


def test_a_mean_over_micro_batches_would_be_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    """Planted: the mean of each micro-batch, as transformers' Trainer takes it for most of these models."""
    config = run_of("token-cls", folders, tmp_path, count=5)
    task, model, _, examples = prepared(config)
    path = task.path(model, config)
    some = [examples[at] for at in range(5)]
    whole = float(path.loss(model, some)[0])
    assert sum(float(path.loss(model, part)[0]) for part in (some[:2], some[2:])) != pytest.approx(whole, rel=0.05)


QUICK = ("token-cls", "seq2seq")
"""Tasks that run whole in the fast suite; the others do in the slow one."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PADDED]
)
def test_a_run_evaluates_as_its_adapter_predicts_and_merges(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A short run; then its adapter on a fresh base, as it is and merged, against training's own evaluation."""
    config = run_of(name, folders, tmp_path)
    result = train(config)
    assert result.after is not None
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())["record"]
    assert record["task"] == name
    task, rows = TASKS[name], load_rows(config.data.evaluation)
    model, tokenizer = load_for(config, record["classes"] or None)
    adapter = lk.load(model, tmp_path / "out", active=True)
    held = task.held(
        rows, tokenizer, config, record["classes"], task.prepare(rows, tokenizer, config, record["classes"])
    )
    again = task.examine(model, tokenizer, held, config, task.path(model, config))
    assert again.numbers() == pytest.approx(result.after.numbers(), rel=1e-5)
    given = task.predict(model, tokenizer, rows, config, record["classes"])
    lk.merge(model, adapter.name)
    merged = task.predict(model, tokenizer, rows, config, record["classes"])
    assert len(given) == len(rows)
    if isinstance(given[0], float) or name == "embeddings":
        torch.testing.assert_close(torch.tensor(merged), torch.tensor(given), rtol=1e-4, atol=1e-5)
    else:
        assert merged == given


@pytest.mark.slow
@pytest.mark.parametrize("name", PADDED)
def test_a_run_resumes_bit_for_bit(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = train(run_of(name, folders, tmp_path, max_steps=6))
    other = run_of(name, folders, tmp_path, max_steps=3, save_steps=3)
    other = other.replace(train__output=str(tmp_path / "again"), train__scheduler="constant")
    first = run_of(name, folders, tmp_path, max_steps=6, save_steps=3).replace(
        train__output=str(tmp_path / "straight"), train__scheduler="constant"
    )
    straight = train(first)
    train(other)
    resumed = train(other.replace(train__max_steps=6, train__resume=True))
    assert whole.adapter.num_parameters() == straight.adapter.num_parameters()
    for one, two in zip(straight.adapter.parameters(), resumed.adapter.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", PADDED)
def test_rows_of_another_task_are_refused_with_the_right_name(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = "seq2seq" if name == "token-cls" else "token-cls"
    run_of(other, folders, tmp_path)
    config = run_of(name, folders, tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(ROWS[other](at)) + "\n" for at in range(4)))
    with pytest.raises(LorakitError, match=rf"{other}|rows of \"text\" and \"label\"|\"text\""):
        prepared(config)


def test_a_base_that_cannot_do_a_task_is_refused_and_those_that_it_can_are_named() -> None:
    with pytest.raises(LorakitError, match=r"no model for seq2seq .*task masked-lm, seq-cls.* embeddings"):
        check_task(tf.BertConfig(), "seq2seq", "here")
    with pytest.raises(LorakitError, match=r"no model for masked-lm .*task causal-lm"):
        check_task(tf.LlamaConfig(), "masked-lm", "here")


def test_a_task_is_found_by_the_base() -> None:
    for architecture, found in (("BertForMaskedLM", "masked-lm"), ("BertForTokenClassification", "token-cls")):
        assert task_of_base(tf.BertConfig(architectures=[architecture])) == found
    assert task_of_base(tf.T5Config(architectures=["T5ForConditionalGeneration"])) == "seq2seq"
    assert task_of_base(tf.LlamaConfig()) == "causal-lm"


def test_the_decoders_input_is_transformers_own(folders: dict[str, Path]) -> None:
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    bart = tf.AutoModelForSeq2SeqLM.from_pretrained(folders["seq2seq"])
    assert torch.equal(decoder_inputs(bart, labels), bart.prepare_decoder_input_ids_from_labels(labels))
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    assert torch.equal(decoder_inputs(t5, labels), t5.prepare_decoder_input_ids_from_labels(labels))


def test_a_long_context_is_read_in_windows_and_the_answer_found_in_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = run_of("question-answering", folders, tmp_path).replace(data__max_length=16)
    context = "the film was good " * 6 + "the sun was in the garden " + "and a film was bad " * 4
    row = {"question": "where was the sun", "context": context, "answers": {"text": ["garden"], "answer_start": [-1]}}
    row["answers"]["answer_start"] = [context.index("garden")]
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    task, rows = TASKS["question-answering"], load_rows(config.data.train)
    tokenizer = tf.AutoTokenizer.from_pretrained(folders["question-answering"])
    windows = list(task.prepare(rows, tokenizer, config, None).examples)
    assert len(windows) > 3
    found = [one for one in windows if one.label != (0, 0)]
    assert found
    for one in found:
        (begin, end), (offsets, whole) = one.label, one.about
        assert whole[offsets[begin][0] : offsets[end][1]] == "garden"


def test_only_the_first_piece_of_a_word_carries_its_label() -> None:
    from lorakit.train.tasks.token_cls import TokenClassification

    class Pieces(dict[str, Any]):
        def word_ids(self) -> list[int | None]:
            return [None, 0, 0, 1, None]

    made = TokenClassification().encode(
        lambda *_, **__: Pieces(input_ids=[1, 7, 8, 9, 2], attention_mask=[1] * 5),
        (["gardens", "in"], [(1, "X"), (0, "O")]),
        64,
    )
    assert made[0].label == [-100, 1, -100, 0, -100]
    assert made[0].count == 2
