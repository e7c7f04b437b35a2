"""Rows of `text` and `label` for a model that classifies sequences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from lorakit.errors import LorakitError
from lorakit.train.config.options import DataOptions
from lorakit.train.data.examples import Prepared, Report, length_limit
from lorakit.train.data.formats import Survey, each_row, fields_of, refuse_bad_rows, say_missing
from lorakit.train.data.rows import BadRow, Indices, Row, Rows
from lorakit.train.data.store import Builder, Examples
from lorakit.train.data.templates import UnusableRow
from lorakit.train.data.tokenise import IGNORED


@dataclass(frozen=True)
class LabelledExample:
    """One tokenised text and the index of its class."""

    input_ids: list[int]
    label: int

    @property
    def labels(self) -> list[int]:
        """The class as the one label of the row, behind a first token that has none, for whatever counts or hashes labels."""
        return [IGNORED, self.label]


class LabelledTexts(Sequence[LabelledExample]):
    """Tokenised texts and the index of the class of each."""

    def __init__(self, texts: Examples, classes: Indices) -> None:
        self.texts, self.classes, self.lengths = texts, classes, texts.lengths

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> LabelledExample: ...
    @overload
    def __getitem__(self, index: slice) -> LabelledTexts: ...
    def __getitem__(self, index: int | slice) -> LabelledExample | LabelledTexts:
        if isinstance(index, slice):
            return LabelledTexts(self.texts[index], self.classes[index])
        return LabelledExample(self.texts.tokens_of(index).tolist(), int(self.classes[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        """A hash of the tokens and classes of all texts in their order."""
        return f"{self.texts.digest()} {self.classes.tobytes().hex()}"


def class_names(rows: Rows, options: DataOptions) -> tuple[str, ...]:
    """The classes that occur in the rows, in the order of their indices.

    Raises LorakitError where there are fewer than two.
    """
    names = _names(rows, options)
    if len(names) < 2:
        raise LorakitError(
            f'{rows.source}: a classifier needs rows of "text" and "label" with at least two different labels; found '
            f"{', '.join(names) or 'none'}. Columns of other names are given by data.columns."
        )
    return names


def _labelled(
    chunk: Iterable[Row], rows: Rows, options: DataOptions
) -> tuple[list[tuple[Row, tuple[str, str]]], list[BadRow]]:
    """Each usable row with its text and label, and the unusable ones."""

    def read(values: Mapping[str, Any]) -> tuple[str, str]:
        label = values.get("label")
        if not isinstance(values.get("text"), str) or not values["text"].strip():
            raise UnusableRow(say_missing("text", values))
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            raise UnusableRow(f'"label" is {label!r}, expected a name or an integer')
        if rows.label_names and isinstance(label, int) and 0 <= label < len(rows.label_names):
            label = rows.label_names[label]
        return values["text"], str(label)

    fields = [one for row in chunk for one in fields_of([row], options.of(row.source))]
    return each_row(fields, read)


def _names(rows: Rows, options: DataOptions) -> tuple[str, ...]:
    for number in np.unique(rows.sources):
        Survey.of(rows.of(number), options.of(number))  # refuses columns that are not there
    found = {label for _, chunk in rows.chunks() for _, (_, label) in _labelled(chunk, rows, options)[0]}
    numeric = all(re.fullmatch(r"-?\d+", label) for label in found)
    return tuple(rows.label_names or sorted(found, key=int if numeric else None))


def names_of(labels: Iterable[Any], rows: Rows, wanted: str, least: int = 2) -> tuple[str, ...]:
    """The classes that occur among labels, in the order of their indices; those of the data set where it names them.

    Raises LorakitError where there are fewer than `least`.
    """
    found = {str(label) for label in labels}
    numeric = all(re.fullmatch(r"-?\d+", label) for label in found)
    names = tuple(rows.label_names or sorted(found, key=int if numeric else None))
    if len(names) < least:
        raise LorakitError(
            f"{rows.source}: rows of {wanted} need at least {least} different labels; found {', '.join(names) or 'none'}"
        )
    return names


def label_of(label: Any, names: Sequence[str]) -> int:
    """The index of a label; raises UnusableRow for one that is none."""
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UnusableRow(f'"label" is {label!r}, expected a name or an integer')
    if str(label) in names:
        return list(names).index(str(label))
    if isinstance(label, int) and 0 <= label < len(names) and not any(re.fullmatch(r"-?\d+", one) for one in names):
        return label
    raise UnusableRow(f'"label" is "{label}", which is not among {", ".join(names)}')


def prepare_labels(rows: Rows, tokenizer: Any, options: DataOptions, names: Sequence[str] | None = None) -> Prepared:
    """Rows of `text` and `label` for a model that classifies sequences.

    Args:
        rows: from `load_rows` or `load_splits`; a label is text or an integer.
        tokenizer: a Hugging Face tokenizer, whose own special tokens are added.
        options: the data section.
        names: the classes by index, to read evaluation rows as the training rows were; None finds them.

    Raises:
        LorakitError: as `prepare`; a label that is not among `names` makes a row unusable.
    """
    names = _names(rows, options) if names is None else names
    index = {name: position for position, name in enumerate(names)}
    limit, builder, classes, bad = length_limit(tokenizer, options), Builder(), [], list[BadRow]()
    counts = Counter[str]()
    for places, chunk in rows.chunks():
        texts, more = _labelled(chunk, rows, options)
        bad += more
        for row, (_, label) in texts:
            if label not in index:
                bad.append(BadRow(row.where, f'"label" is "{label}", which is not among {", ".join(names)}'))
        texts = [(row, one) for row, one in texts if one[1] in index]
        place = {id(row): int(at) for at, row in zip(places, chunk, strict=True)}
        encoded = tokenizer([text for _, (text, _) in texts], verbose=False)["input_ids"] if texts else []
        for (row, (text, label)), ids in zip(texts, encoded, strict=True):
            if len(ids) > limit:
                if options.overflow == "refuse":
                    raise LorakitError(f"{row.where}: {len(ids)} tokens, above data.max_length {limit}")
                if options.overflow == "drop":
                    counts["too_long"] += 1
                    continue
                if options.overflow != "cut":
                    raise LorakitError(
                        f"data.overflow {options.overflow} is not for classification; use cut, drop or refuse"
                    )
                counts.update(truncated=1, tokens_cut=len(ids) - limit)
                ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
            builder.add(place[id(row)], ids, ids)
            classes.append(index[label])
    skipped = (*rows.bad, *bad)
    refuse_bad_rows(skipped, len(rows) + len(rows.bad), options)
    shared = builder.take_shared()
    made = builder.made({})
    order = made.order(rows.order)
    kept = LabelledTexts(made.examples.pick(order), np.array(classes, dtype=np.int64)[order])
    report = Report(
        source=rows.source,
        rows=len(rows) + len(rows.bad),
        examples=len(kept),
        tokens=int(kept.lengths.sum()),
        label_tokens=len(kept),
        longest=int(kept.lengths.max(initial=0)),
        bad=skipped,
        format="classification",
        template="none",
        max_length=limit,
        shared_prefix=shared,
        truncated=counts["truncated"],
        tokens_cut=counts["tokens_cut"],
        too_long=counts["too_long"],
    )
    if not kept:
        raise LorakitError(f"prepare_labels: no example is left of {rows.source}. " + "; ".join(report.lines()))
    return Prepared(kept, report, tuple(names))
