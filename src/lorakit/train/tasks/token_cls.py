"""A class of each word of a text: names, parts of speech, parts of an address."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lorakit.train import metrics
from lorakit.train.data.classification import label_of, names_of
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.rows import Rows
from lorakit.train.data.templates import UnusableRow
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.step.packing import pad_rows
from lorakit.train.tasks.classification import class_sums
from lorakit.train.tasks.contract import Columns, PaddedTask

if TYPE_CHECKING:
    from lorakit.train.config.run import TrainConfig


class TokenClassification(PaddedTask):
    """The first piece of a word carries its label, the others none; a word that the limit cuts off has the answer None."""

    name = "token-cls"
    columns: ClassVar[Columns] = {"tokens": ("tokens", "words"), "labels": ("ner_tags", "tags", "labels", "pos_tags")}
    answer = ("labels",)
    head = "outside"
    learned = "the class of each word"

    def classes(self, rows: Rows, config: TrainConfig) -> tuple[str, ...] | None:
        every = (one for values in self.values(rows, config) for one in self.get(values, "labels"))
        return names_of(every, dataclasses.replace(rows, label_names=None), self.wanted())

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        words = self.get(values, "tokens")
        if not isinstance(words, list) or not words or not all(isinstance(one, str) for one in words):
            raise UnusableRow(f'"tokens" is {words!r:.40}, expected a list of words')
        if asked:
            return words, None
        labels = self.get(values, "labels")
        if not isinstance(labels, list) or len(labels) != len(words):
            many = len(labels) if isinstance(labels, list) else 0
            raise UnusableRow(f"{len(words)} words have {many} labels; each word needs one")
        return words, [(label_of(one, classes or ()), (classes or ())[label_of(one, classes or ())]) for one in labels]

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        words, labels = given
        made = tokenizer(words, is_split_into_words=True, verbose=False)
        lost = max(0, len(made["input_ids"]) - limit)
        if lost:
            made = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
        first: list[int | None] = [None] * len(words)
        for place, word in enumerate(made.word_ids()):
            if word is not None and first[word] is None:
                first[word] = place
        inputs = {name: list(ids) for name, ids in made.items() if name != "attention_mask"}
        shown = " ".join(words)
        if labels is None:
            return [Encoded(inputs, about=first, shown=shown, cut=lost)]
        learned = [IGNORED] * len(inputs["input_ids"])
        for at, (index, _) in zip(first, labels, strict=True):
            if at is not None:
                learned[at] = index
        count = sum(one != IGNORED for one in learned)
        names = [name for _, name in labels]
        return [Encoded(inputs, learned, count, about=first, expected=names, shown=shown, cut=lost)]

    def labels(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        return {"labels": pad_rows([one.label for one in examples], IGNORED)}

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        labels = pad_rows([one.label for one in examples], IGNORED).to(outputs.logits.device)
        chosen = labels != IGNORED
        return class_sums(outputs.logits[chosen], labels[chosen], smoothing)

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        names, best = model.config.id2label, outputs.logits.argmax(-1).tolist()
        return [
            [None if place is None else names[row[place]] for place in one.about]
            for row, one in zip(best, examples, strict=True)
        ]

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        """Accuracy over words, and F1: of entities where the labels are B-, I- and O, else the mean over classes."""
        answers = [[one or "O" for one in row] for row in given]
        flat, wanted = [one for row in answers for one in row], [one for row in expected for one in row]
        found = {"accuracy": metrics.accuracy(flat, wanted)}
        if all(one == "O" or one[:2] in ("B-", "I-") for one in wanted):
            return found | metrics.entities(answers, expected)
        return found | {"macro_f1": metrics.macro_f1(flat, wanted)}
