"""Texts, or pairs of texts, to a class, several labels, a number or a rank: one head, four losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.models.evaluating import evaluating
from lorakit.native.elementwise import wide
from lorakit.train import metrics
from lorakit.train.data.classification import class_names, label_of, names_of, prepare_labels
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.examples import Prepared
from lorakit.train.data.rows import Rows
from lorakit.train.data.templates import UnusableRow
from lorakit.train.evaluate import Evaluation, EvaluationSet, measure
from lorakit.train.step.classes import choose_class_path
from lorakit.train.step.loss import LossPath
from lorakit.train.tasks.contract import Columns, PaddedTask, encoded_text

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.train.config.run import TrainConfig

TEXT = {"text": ("text", "sentence")}
PAIR = {
    "first": ("text", "sentence1", "premise", "question1", "question", "first"),
    "second": ("text_pair", "sentence2", "hypothesis", "question2", "second"),
}
LABEL = {"label": ("label", "labels")}


class _OfTexts(PaddedTask):
    """A head of transformers' sequence classifiers over one text or a pair."""

    answer = ("label",)
    head = "outside"

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        texts = [self.text(values, column) for column in self.columns if column not in self.answer]
        return texts, None if asked else self.label(self.get(values, "label"), classes)

    def label(self, given: Any, classes: Sequence[str] | None) -> Any:
        """What the loss reads of a label; raises UnusableRow."""
        raise NotImplementedError

    def expected(self, label: Any, classes: Any = None) -> Any:
        """The label as an answer."""
        return label

    def labels(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([one.label for one in examples])}

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        texts, label = given
        inputs, lost = encoded_text(tokenizer, limit, *texts)
        count = self.outputs(label)
        return [Encoded(inputs, label, count, expected=label, shown=" | ".join(texts), cut=lost)]

    def outputs(self, label: Any) -> int:
        """How many outputs of the head a label is compared with."""
        return 1


class PairClassification(_OfTexts):
    """A class of each pair of texts."""

    name = "pair-cls"
    columns: ClassVar[Columns] = {**PAIR, **LABEL}
    learned = "the class of each pair"
    measures = ("loss",)

    def classes(self, rows: Rows, config: TrainConfig) -> tuple[str, ...] | None:
        return names_of((self.get(values, "label") for values in self.values(rows, config)), rows, self.wanted())

    def label(self, given: Any, classes: Sequence[str] | None) -> Any:
        return label_of(given, classes or ())

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([one.label for one in examples], device=outputs.logits.device)
        return class_sums(outputs.logits, labels, smoothing)

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        return [model.config.id2label[place] for place in outputs.logits.argmax(-1).tolist()]

    def examine(
        self, model: Any, tokenizer: Any, held: EvaluationSet, config: TrainConfig, path: LossPath
    ) -> Evaluation:
        named = [
            dataclasses.replace(one, expected=model.config.id2label[one.label]) for one in list[Any](held.examples)
        ]
        return super().examine(model, tokenizer, EvaluationSet(named), config, path)

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        return {"accuracy": metrics.accuracy(given, expected), "macro_f1": metrics.macro_f1(given, expected)}


class TextClassification(PairClassification):
    """A class of each text, packed without padding where the model is an encoder that takes it."""

    name = "seq-cls"
    columns: ClassVar[Columns] = {**TEXT, **LABEL}
    learned = "the class of each text"
    known_by_columns = False

    def classes(self, rows: Rows, config: TrainConfig) -> tuple[str, ...] | None:
        return class_names(rows, config.data)

    def prepare(
        self,
        rows: Rows,
        tokenizer: Any,
        config: TrainConfig,
        classes: Sequence[str] | None,
        console: Console | None = None,
        *,
        streaming: bool = False,
        asked: bool = False,
    ) -> Prepared:
        if asked:
            return super().prepare(rows, tokenizer, config, classes, console, asked=True)
        return prepare_labels(rows, tokenizer, config.data, classes)

    def calibration(self, model: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        return lambda examples: super(TextClassification, self).calibration(model)(
            [Encoded({"input_ids": one.input_ids}, one.label) for one in examples]
        )

    def path(self, model: Any, config: TrainConfig) -> LossPath:
        return choose_class_path(model, "off" if config.train.neftune else config.train.fast_path)

    def examine(
        self, model: Any, tokenizer: Any, held: EvaluationSet, config: TrainConfig, path: LossPath
    ) -> Evaluation:
        with path.opened(model), evaluating(model):
            how: dict[str, Any] = {"batch_size": config.train.evaluation_batch_size, "loss_of": path.loss}
            found = measure(model, tokenizer, held, config.evaluate, **how)
        # one label a text: its "tokens" are texts
        return dataclasses.replace(found, accuracy=found.token_accuracy, token_accuracy=None, perplexity=None)


class MultiLabel(_OfTexts):
    """Any number of labels of each text, each an output of its own."""

    name = "multi-label"
    columns: ClassVar[Columns] = {**TEXT, "label": ("labels", "label")}
    learned = "each label of each text, present or not"

    def classes(self, rows: Rows, config: TrainConfig) -> tuple[str, ...] | None:
        every = (one for values in self.values(rows, config) for one in _several(self.get(values, "label")))
        return names_of(every, rows, self.wanted(), least=1)

    def model_options(self, classes: Sequence[str] | None) -> dict[str, Any]:
        return {**super().model_options(classes), "problem_type": "multi_label_classification"}

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        texts, label = super().read(values, classes, asked)
        return texts, label, [] if asked else [str(one) for one in (classes or ())]

    def label(self, given: Any, classes: Sequence[str] | None) -> Any:
        places = {label_of(one, classes or ()) for one in _several(given)}
        return [float(place in places) for place in range(len(classes or ()))]

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        texts, label, names = given
        [made] = super().encode(tokenizer, (texts, label), limit)
        present = [name for name, value in zip(names, label or (), strict=False) if value]
        return [dataclasses.replace(made, expected=present)]

    def outputs(self, label: Any) -> int:
        return len(label or ())

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        logits = wide(outputs.logits)
        labels = torch.tensor([one.label for one in examples], device=logits.device, dtype=logits.dtype)
        soft = labels * (1 - smoothing) + smoothing / 2
        total = nn.functional.binary_cross_entropy_with_logits(logits, soft, reduction="sum")
        return total, ((logits > 0) == (labels > 0.5)).sum()

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        names = model.config.id2label
        return [[names[at] for at, value in enumerate(row) if value > 0] for row in outputs.logits.tolist()]

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        return {"micro_f1": metrics.micro_f1(given, expected), "exact_match": metrics.accuracy(given, expected)}


class Regression(_OfTexts):
    """A number for each text, or for each pair of texts where rows have two."""

    name = "regression"
    columns: ClassVar[Columns] = {**TEXT, "label": ("label", "score", "labels")}
    learned = "the number of each text"

    def model_options(self, classes: Sequence[str] | None) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def fits(self, columns: Any, asked: bool = False) -> bool:
        given = set(columns)
        return super().fits(given, asked) or (
            all(given & set(names) for names in PAIR.values()) and (asked or bool(given & set(self.columns["label"])))
        )

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        second = next((values[name] for name in PAIR["second"] if isinstance(values.get(name), str)), None)
        if second is None:
            return super().read(values, classes, asked)
        first = next((values[name] for name in PAIR["first"] if isinstance(values.get(name), str)), "")
        return [first, second], None if asked else self.label(self.get(values, "label"), classes)

    def label(self, given: Any, classes: Sequence[str] | None) -> Any:
        try:
            value = float(given)
        except (TypeError, ValueError):
            value = float("nan")
        if value != value or value in (float("inf"), -float("inf")) or isinstance(given, bool):
            raise UnusableRow(f'"label" is {given!r:.40}, expected a number')
        return value

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        found = wide(outputs.logits)[:, 0]
        labels = torch.tensor([one.label for one in examples], device=found.device, dtype=found.dtype)
        return ((found - labels) ** 2).sum(), torch.zeros((), device=found.device)

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        return [float(value) for value in outputs.logits[:, 0].float().tolist()]

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        return {"pearson": metrics.pearson(given, expected), "spearman": metrics.spearman(given, expected)}

    def is_right(self, given: Any, expected: Any) -> bool:
        return bool(abs(given - expected) <= 0.5)


class Reranker(Regression):
    """How well a passage answers a query: a cross-encoder with one output, 0 or 1 learned by cross entropy."""

    name = "reranker"
    columns: ClassVar[Columns] = {
        "query": ("query", "question", "anchor"),
        "passage": ("passage", "document", "text", "positive"),
        **LABEL,
    }
    learned = "whether each passage answers its query"

    def model_options(self, classes: Sequence[str] | None) -> dict[str, Any]:
        return {"num_labels": 1}

    def fits(self, columns: Any, asked: bool = False) -> bool:
        return PaddedTask.fits(self, columns, asked)

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        return _OfTexts.read(self, values, classes, asked)

    def label(self, given: Any, classes: Sequence[str] | None) -> Any:
        value = super().label(float(given) if isinstance(given, bool) else given, classes)
        if not 0 <= value <= 1:
            raise UnusableRow(f'"label" is {given!r:.40}, expected 0 or 1, or a share between')
        return value

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        [made] = super().encode(tokenizer, given, limit)
        return [dataclasses.replace(made, expected=(given[0][0], given[1]))]

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        found = wide(outputs.logits)[:, 0]
        labels = torch.tensor([one.label for one in examples], device=found.device, dtype=found.dtype)
        total = nn.functional.binary_cross_entropy_with_logits(found, labels, reduction="sum")
        return total, ((found > 0) == (labels > 0.5)).sum()

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        return [float(value) for value in outputs.logits[:, 0].float().sigmoid().tolist()]

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        """MRR@10 and nDCG@10 over queries that have a right passage, and accuracy over all pairs."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for score, (query, label) in zip(given, expected, strict=True):
            groups.setdefault(query, []).append((score, label))
        ranked = [[label for _, label in sorted(one, key=lambda pair: -pair[0])] for one in groups.values()]
        right = [(score > 0.5) == (label > 0.5) for score, (_, label) in zip(given, expected, strict=True)]
        return {"accuracy": sum(right) / max(1, len(right)), **metrics.ranking([one for one in ranked if any(one)])}

    def is_right(self, given: Any, expected: Any) -> bool:
        return bool((given > 0.5) == (expected[1] > 0.5))


def class_sums(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The sum of the cross entropy of logits `[rows, classes]`, and how many rows are right."""
    total = nn.functional.cross_entropy(wide(logits), labels, reduction="sum", label_smoothing=smoothing)
    return total, (logits.detach().argmax(-1) == labels).sum()


def _several(given: Any) -> list[Any]:
    """The labels of a row: a list, or names in one text between commas."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",") if part.strip()]
    if not isinstance(given, list):
        raise LorakitError(f"multi-label: labels are {given!r:.40}, expected a list of names or integers")
    return given
