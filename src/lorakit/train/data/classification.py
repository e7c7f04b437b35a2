"""Rows of `text` and `label` for a model that classifies sequences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import LorakitError
from lorakit.train.config.options import DataOptions
from lorakit.train.data.examples import Prepared, Report, length_limit
from lorakit.train.data.formats import each_row, refuse_bad_rows, renamed, say_missing
from lorakit.train.data.reading import BadRow, Row, Rows
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


def class_names(rows: Rows, options: DataOptions) -> tuple[str, ...]:
    """The classes that occur in the rows, in the order of their indices.

    Raises LorakitError where there are fewer than two.
    """
    texts, _ = _labelled(rows, options)
    names = _names(rows, texts)
    if len(names) < 2:
        raise LorakitError(
            f'{rows.source}: a classifier needs rows of "text" and "label" with at least two different labels; found '
            f"{', '.join(names) or 'none'}. Columns of other names are given by data.columns."
        )
    return names


def _labelled(rows: Rows, options: DataOptions) -> tuple[list[tuple[Row, tuple[str, str]]], list[BadRow]]:
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

    return each_row(renamed(rows, options), read)


def _names(rows: Rows, texts: Sequence[tuple[Row, tuple[str, str]]]) -> tuple[str, ...]:
    found = {label for _, (_, label) in texts}
    numeric = all(re.fullmatch(r"-?\d+", label) for label in found)
    return tuple(rows.label_names or sorted(found, key=int if numeric else None))


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
    texts, bad = _labelled(rows, options)
    names = _names(rows, texts) if names is None else names
    index = {name: position for position, name in enumerate(names)}
    for row, (_, label) in texts:
        if label not in index:
            bad.append(BadRow(row.where, f'"label" is "{label}", which is not among {", ".join(names)}'))
    texts = [(row, one) for row, one in texts if one[1] in index]
    refuse_bad_rows((*rows.bad, *bad), len(rows) + len(rows.bad), options)
    limit = length_limit(tokenizer, options)
    encoded = tokenizer([text for _, (text, _) in texts], verbose=False)["input_ids"] if texts else []
    kept: list[LabelledExample] = []
    truncated = cut = too_long = 0
    for (row, (text, label)), ids in zip(texts, encoded, strict=True):
        if len(ids) > limit:
            if options.overflow == "refuse":
                raise LorakitError(f"{row.where}: {len(ids)} tokens, above data.max_length {limit}")
            if options.overflow == "drop":
                too_long += 1
                continue
            if options.overflow != "cut":
                raise LorakitError(
                    f"data.overflow {options.overflow} is not for classification; use cut, drop or refuse"
                )
            truncated, cut = truncated + 1, cut + len(ids) - limit
            ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        kept.append(LabelledExample(list(ids), index[label]))
    facts = {"max_length": limit, "truncated": truncated, "tokens_cut": cut, "too_long": too_long}
    skipped = (*rows.bad, *bad)
    report = Report.of(rows, kept, len(kept), skipped, format="classification", template="none", **facts)
    if not kept:
        raise LorakitError(f"prepare_labels: no example is left of {rows.source}. " + "; ".join(report.lines()))
    return Prepared(kept, report, tuple(names))
