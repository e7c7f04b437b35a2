"""Classifiers of texts: packed texts against each text alone, the padded path, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.train import train
from lorakit.train.config.run import DataOptions, TrainConfig, TrainOptions
from lorakit.train.data.classification import LabelledExample
from lorakit.train.step.attention import packed_attention
from lorakit.train.step.classes import PACKED, PADDED, choose_class_path, encoder_support, packed_logits

WORDS = "[PAD] [CLS] [SEP] [UNK] good fine great bad poor awful the a film was and".split()  # noqa: SIM905
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
CONFIGS = {
    "bert": lambda: tf.BertConfig(**SMALL, pad_token_id=0),
    "roberta": lambda: tf.RobertaConfig(**SMALL, pad_token_id=1),
    "electra": lambda: tf.ElectraConfig(**SMALL, embedding_size=16, pad_token_id=0),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=61, dim=24, hidden_dim=40, n_layers=2, n_heads=4, max_position_embeddings=64, num_labels=3
    ),
}


def classifier(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """A sequence classifier with random weights large enough that attention matters."""
    torch.manual_seed(0)
    model: Any = tf.AutoModelForSequenceClassification.from_config(CONFIGS[kind]()).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model.eval()


def texts(count: int = 5) -> list[LabelledExample]:
    """Texts of unequal lengths; no token is a padding token."""
    generator = torch.Generator().manual_seed(3)
    return [
        LabelledExample(torch.randint(3, 61, (3 + 4 * i,), generator=generator).tolist(), i % 3) for i in range(count)
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_flat_row_gives_each_text_its_own_logits(kind: str) -> None:
    model = classifier(kind)
    support = encoder_support(model)
    assert support.reason is None
    examples = texts()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([one.input_ids])).logits for one in examples])
        with packed_attention(model):
            flat = packed_logits(model, [one.input_ids for one in examples], support)
    torch.testing.assert_close(flat, alone, rtol=1e-6, atol=1e-6)  # layer norms of some models compute in float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_paths_give_the_same_gradients(kind: str) -> None:
    model = classifier(kind)
    adapter = lk.attach(model, lk.LoRA(rank=3), modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.2)
    found = []
    for path in (PADDED, PACKED):
        with path.opened(model):
            loss, stats = path.loss(model, texts(), num_items=5.0, label_smoothing=0.1)
            loss.backward()
        found.append((loss.item(), float(stats.right), stats.targets, [p.grad.clone() for p in adapter.parameters()]))
        for parameter in adapter.parameters():
            parameter.grad = None
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1:3] == found[1][1:3]
    assert found[0][2] == 5
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in found[0][3])
    for padded, flat in zip(found[0][3], found[1][3], strict=True):
        torch.testing.assert_close(flat, padded, rtol=1e-5, atol=1e-6)


def test_a_flat_row_that_looks_across_texts_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: padding is visible, so that a text's tokens see zeros."""
    import lorakit.train.step.classes as classes

    honest = classes.pack_texts

    def blind(*arguments: Any) -> Any:
        batch = honest(*arguments)
        batch.hidden.zero_()
        return batch

    monkeypatch.setattr(classes, "pack_texts", blind)
    assert "other logits" in str(encoder_support(classifier("bert")).reason)


def test_a_decoder_that_classifies_is_trained_padded() -> None:
    config = tf.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0)
    model = tf.AutoModelForSequenceClassification.from_config(config).eval()
    assert choose_class_path(model) is PADDED
    assert choose_class_path(classifier("bert"), "off") is PADDED


def test_dropout_in_attention_drops_its_share_and_keeps_the_mean() -> None:
    from lorakit.train.step.encoder_attention import _Drop

    torch.manual_seed(0)
    x = torch.ones(101, 7, 41, dtype=torch.float64, requires_grad=True)
    dropped = _Drop.apply(x, 0.3)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    spread = (0.3 * 0.7 / x.numel()) ** 0.5
    assert float(1 - dropped.mean()) == pytest.approx(0.3, abs=5 * spread)
    for axis in range(3):  # no place is favoured
        counts = (1 - dropped).mean(dim=[other for other in range(3) if other != axis])
        assert float((counts - 0.3).abs().max()) < 6 * spread * (x.shape[axis] ** 0.5)
    dropped.backward(torch.full_like(dropped, 2.0))
    assert torch.equal(x.grad, 2 * dropped.detach())


def test_dropout_in_attention_is_that_of_the_padded_path() -> None:
    """Means of many passes in training mode: each path draws its own masks."""
    model = classifier("bert")
    support = encoder_support(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.25 if name.endswith("attention.self.dropout") else 0.0
    rows = [one.input_ids for one in texts(3)]
    still = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows]).detach()
    model.train()
    with torch.no_grad():
        plain = torch.stack(
            [torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows]) for _ in range(300)]
        )
        with packed_attention(model):
            flat = torch.stack([packed_logits(model, rows, support) for _ in range(300)])
    error = ((plain.var(0) + flat.var(0)) / 300).sqrt()
    assert float(((plain.mean(0) - flat.mean(0)) / error).abs().max()) < 5
    assert float(((plain - still).std() / (flat - still).std()).log().abs()) < 0.2


def test_a_text_without_tokens_is_refused() -> None:
    from lorakit.train.step.packing import pack_texts

    with pytest.raises(ValueError, match="no token"):
        pack_texts([[1, 2], []])


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A tiny BERT with a tokenizer of whole words."""
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    folder = tmp_path / "bert"
    tf.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(0)
    # Without dropout, which would draw other masks on either path.
    undisturbed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tf.BertModel(tf.BertConfig(**SMALL, **undisturbed, pad_token_id=0))
    with torch.no_grad():  # large enough that words differ
        model.embeddings.word_embeddings.weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


def write_reviews(path: Path, count: int) -> Path:
    """Rows whose class is told by one word."""
    kinds = {"praise": ["good", "fine", "great"], "blame": ["bad", "poor", "awful"]}
    names = list(kinds)
    rows = [
        {
            "text": f"the film was {kinds[names[i % 2]][i // 2 % 3]}" + " and a film" * (i // 6 % 4),
            "label": names[i % 2],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configuration(folder: Path, tmp_path: Path, **options: Any) -> TrainConfig:
    """A short run of the classifier."""
    return TrainConfig(
        model=str(folder),
        task="seq-cls",
        method=lk.LoRA(rank=4),
        data=DataOptions(
            train=str(write_reviews(tmp_path / "train.jsonl", 64)),
            evaluation=str(write_reviews(tmp_path / "held_out.jsonl", 22)),
        ),
        train=TrainOptions(
            output=str(tmp_path / "out"),
            epochs=12,
            batch_size=8,
            learning_rate=2e-3,  # at 5e-3 the loss rises again late in the run, more or less by the order of sums
            precision="fp32",
            compile="off",
            **options,
        ),
    )


def test_a_run_learns_classes_and_its_adapter_loads(bert_folder: Path, tmp_path: Path) -> None:
    result = train(configuration(bert_folder, tmp_path))
    assert result.after is not None
    assert result.before is not None
    assert result.before.accuracy is not None
    assert result.before.accuracy < 0.8
    assert result.after.accuracy == 1.0
    assert result.after.token_accuracy is None
    assert result.record.path == "no padding"
    assert result.record.classes == ["blame", "praise"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "`blame`, `praise`" in card

    torch.manual_seed(99)  # another head: the adapter brings its own
    fresh: Any = tf.AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2).eval()
    lk.activate(fresh, lk.load(fresh, tmp_path / "out").name)
    ids = result.tokenizer("the film was awful", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=ids).logits, result.model(input_ids=ids).logits)
        assert fresh(input_ids=ids).logits.argmax() == 0


def test_both_paths_train_to_the_same_adapter(bert_folder: Path, tmp_path: Path) -> None:
    config = configuration(bert_folder, tmp_path, max_steps=4)
    flat = train(config.replace(train__output=str(tmp_path / "flat")))
    padded = train(config.replace(train__output=str(tmp_path / "padded"), train__fast_path="off"))
    assert padded.record.path == "off: padded batches"
    for one, other in zip(flat.adapter.parameters(), padded.adapter.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_one_class_is_too_few(bert_folder: Path, tmp_path: Path) -> None:
    config = configuration(bert_folder, tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a film", "label": "praise"}\n')
    with pytest.raises(LorakitError, match="at least two different labels; found praise"):
        train(config)


def test_a_task_and_its_rows_must_fit() -> None:
    with pytest.raises(LorakitError, match="needs task: seq-cls"):
        TrainConfig(model="m", data=DataOptions(train="t.jsonl", format="classification"))
    with pytest.raises(LorakitError, match="use classification or auto"):
        TrainConfig(model="m", task="seq-cls", data=DataOptions(train="t.jsonl", format="text"))
