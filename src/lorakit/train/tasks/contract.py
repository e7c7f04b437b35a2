"""What a task is: its rows, its examples, its loss with numerator and denominator, its head, its metric and its answers.

A task is one file of this room and one row of the table in `__init__.py`; its transformers class is a row of
`lorakit.models.tasks.TASKS`. Whatever handles runs (check, run, the verbs of the command line) asks the task and knows none by
name. A task with a fast path overrides `path`; `PaddedTask` is the general step for all others: rows padded into a batch, the
model's own forward, the sum of losses over the examples' counts.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import LorakitError, plural
from lorakit.models.evaluating import evaluating
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.examples import Prepared, Report, length_limit
from lorakit.train.data.formats import Survey, each_row, fields_of, refuse_bad_rows
from lorakit.train.data.rows import BadRow, Rows
from lorakit.train.data.templates import UnusableRow
from lorakit.train.evaluate import Answer, Evaluation, EvaluationSet
from lorakit.train.step.loss import LossPath, LossStats
from lorakit.train.step.noise import tell_lengths
from lorakit.train.step.packing import mask_of, pad, pad_rows

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.train.config.run import TrainConfig

log = logging.getLogger("lorakit.train")


Columns = Mapping[str, tuple[str, ...]]
"""Our columns -> the names that data sets have for each, ours first."""


class Task(ABC):
    """A task of the table.

    Attributes:
        name: its row in the table, and in `lorakit.models.tasks.TASKS`.
        columns: what its rows hold: our column -> the names that data sets have for it, ours first.
        answer: the columns that are learned, which rows that are only asked do not have.
        head: which modules train in full beside the adapter: none, those that the checkpoint lacks ("missing"), or all that
            stand outside the backbone ("outside").
        learned: what carries loss, in words.
        known_by_columns: whether rows of other columns are refused in the words of the table; others say it themselves.
    """

    name: ClassVar[str]
    columns: ClassVar[Columns]
    answer: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[Literal["none", "missing", "outside"]] = "none"
    learned: ClassVar[str]
    known_by_columns: ClassVar[bool] = True

    def fits(self, columns: Iterable[str], asked: bool = False) -> bool:
        """Whether rows of these columns are rows of this task; `asked`: without what is learned."""
        given = set(columns)
        needed = [names for ours, names in self.columns.items() if not (asked and ours in self.answer)]
        return all(given & set(names) for names in needed)

    def wanted(self) -> str:
        """Its columns in words."""
        return " and ".join(
            names[0] + (f" (or {', '.join(names[1:])})" if names[1:] else "") for names in self.columns.values()
        )

    def classes(self, rows: Rows, config: TrainConfig) -> tuple[str, ...] | None:
        """The names of its classes by index, found in the rows; None for a task without classes."""
        return None

    def model_options(self, classes: Sequence[str] | None) -> dict[str, Any]:
        """The arguments of `load_model` that make the task's head."""
        if classes is None:
            return {}
        names = dict(enumerate(classes))
        return {
            "id2label": names,
            "label2id": {name: place for place, name in names.items()},
            "num_labels": len(classes),
        }

    def learns(self, config: TrainConfig) -> str:
        """What carries loss in a run, in words."""
        return self.learned

    def calibration(self, model: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """How examples become the batches, with labels, that an informed start measures a model on."""
        return pad

    def check_model(self, model: Any, where: str) -> None:  # noqa: B027 - most can be asked for nothing more
        """LorakitError where a loaded model cannot do the task."""

    def settle(self, model: Any) -> None:  # noqa: B027 - most leave it as it is
        """Takes off a loaded model what the task does not use."""

    def facts(self, model: Any) -> dict[str, Any]:
        """What of the task is stored with the adapter beside its name and classes."""
        return {}

    @abstractmethod
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
        """Rows as examples. `streaming`: they are the first of many; `asked`: without what is learned."""

    @abstractmethod
    def path(self, model: Any, config: TrainConfig) -> LossPath:
        """How the loss of this task is computed on a model."""

    @abstractmethod
    def examine(
        self, model: Any, tokenizer: Any, held: EvaluationSet, config: TrainConfig, path: LossPath
    ) -> Evaluation:
        """The loss and the metric of the route in use on held-out rows."""

    @abstractmethod
    def predict(
        self, model: Any, tokenizer: Any, rows: Rows, config: TrainConfig, classes: Sequence[str] | None
    ) -> list[Any]:
        """The answer of the route in use to each row, plain data."""

    def held(
        self, rows: Rows, tokenizer: Any, config: TrainConfig, classes: Sequence[str] | None, prepared: Prepared
    ) -> EvaluationSet:
        """Evaluation rows, which are `prepared` as examples, made ready for what is measured on them."""
        return EvaluationSet(prepared.examples)

    def export(self, model: Any, folder: Any) -> None:  # noqa: B027 - most need none
        """Files that a merged model's folder needs beside those of transformers."""


class PaddedTask(Task):
    """A task whose step is general: rows are padded into a batch and go through the model's own forward."""

    measures: ClassVar[tuple[str, ...]] = ("loss",)

    # -- what a task of this kind says ---------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        """What the task needs of a row; raises UnusableRow with the reason."""

    @abstractmethod
    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        """What `read` gave as examples: one, or several for a row that is read in windows."""

    @abstractmethod
    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        """The sum of losses over the examples' counts, and how many of these were right."""

    @abstractmethod
    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        """What the outputs say of each example, for `combine`."""

    @abstractmethod
    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        """The task's metric over the answers to all rows."""

    def combine(self, examples: Sequence[Encoded], decoded: Sequence[Any]) -> list[Any]:
        """The answer to each row, from those to its examples."""
        return list(decoded)

    def is_right(self, given: Any, expected: Any) -> bool:
        """Whether an answer counts as right among the samples that are shown."""
        return bool(given == expected)

    # -- rows to examples ----------------------------------------------------------------------------------------------------

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
        """Rows as examples, with what became of them.

        Raises:
            LorakitError: rows cannot be used, are too long where that is refused, or none is left.
        """
        options = config.data
        if options.overflow not in ("cut", "drop", "refuse"):
            raise LorakitError(f"data.overflow {options.overflow} is not for {self.name}; use cut, drop or refuse")
        limit, by_row, bad, counts = length_limit(tokenizer, options), dict[int, list[Encoded]](), [], Counter[str]()
        for places, chunk, fields in self._chunks(rows, config):
            place = {id(row): int(at) for at, row in zip(places, chunk, strict=True)}
            kept, more = each_row(fields, lambda values: self.read(values, classes, asked))
            bad += more
            for row, given in kept:
                made = self.encode(tokenizer, given, limit)
                lost = sum(one.cut for one in made)
                if lost and options.overflow == "refuse":
                    raise LorakitError(f"{row.where}: {limit + lost} tokens, above data.max_length {limit}")
                if lost and options.overflow == "drop" and not asked:
                    counts["too_long"] += 1
                    continue
                counts.update(truncated=bool(lost), tokens_cut=lost, split=len(made) - 1)
                if not asked and not sum(one.count for one in made):
                    counts["without_labels"] += 1
                    continue
                by_row[place[id(row)]] = made
        skipped: tuple[BadRow, ...] = (*rows.bad, *bad)
        refuse_bad_rows(skipped, len(rows) + len(rows.bad), options)
        order = range(len(rows)) if rows.order is None else rows.order.tolist()
        examples = [
            Encoded(**{**vars(one), "row": number})
            for number, at in enumerate(order)
            for one in by_row.get(at, ())
        ]  # fmt: skip
        lengths = [len(one.input_ids) for one in examples]
        report = Report(
            source=rows.source,
            rows=len(rows) + len(rows.bad),
            examples=len(examples),
            tokens=sum(lengths),
            label_tokens=sum(one.count for one in examples),
            longest=max(lengths, default=0),
            bad=skipped,
            format=self.name,
            template="none",
            max_length=limit,
            truncated=counts["truncated"],
            tokens_cut=counts["tokens_cut"],
            split=counts["split"],
            too_long=counts["too_long"],
            without_labels=counts["without_labels"],
        )
        if not examples:
            raise LorakitError(f"prepare: no example is left of {rows.source}. " + "; ".join(report.lines()))
        return Prepared(examples, report, tuple(classes or ()))

    def _chunks(self, rows: Rows, config: TrainConfig) -> Iterator[tuple[Any, Any, Any]]:
        for number in np.unique(rows.sources):
            Survey.of(rows.of(number), config.data.of(number))  # refuses columns that are not there
        for places, chunk in rows.chunks():
            yield places, chunk, [one for row in chunk for one in fields_of([row], config.data.of(row.source))]

    def values(self, rows: Rows, config: TrainConfig) -> Iterator[Mapping[str, Any]]:
        """What each row holds, under our column names."""
        for _, _, fields in self._chunks(rows, config):
            yield from (values for _, values in fields)

    def get(self, values: Mapping[str, Any], column: str) -> Any:
        """A column of a row under any of its names.

        Raises:
            UnusableRow: there is none.
        """
        for name in self.columns[column]:
            if values.get(name) is not None:
                return values[name]
        names = " or ".join(f'"{name}"' for name in self.columns[column])
        raise UnusableRow(f"there is no column {names}; the row has {', '.join(map(str, values)) or 'none'}")

    def text(self, values: Mapping[str, Any], column: str) -> str:
        """A column that must be text."""
        found = self.get(values, column)
        if not isinstance(found, str) or not found.strip():
            raise UnusableRow(f'"{column}" is {found!r:.40}, expected text')
        return found

    # -- the step ------------------------------------------------------------------------------------------------------------

    def batch(self, model: Any, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The arguments of the model for some examples: token rows padded on the right, tensors stacked."""
        device = next(model.parameters()).device
        made: dict[str, Tensor] = {}
        for name, first in examples[0].inputs.items():
            given = [one.inputs[name] for one in examples]
            pad = int(getattr(model.config, "pad_token_id", None) or 0) if name == "input_ids" else 0
            made[name] = torch.stack(given) if isinstance(first, Tensor) else pad_rows(given, pad)
            if name == "input_ids":
                made["attention_mask"] = mask_of(given)
        return {name: tensor.to(device) for name, tensor in made.items()}

    def labels(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The labels of some examples as transformers' own loss takes them, by argument; none where it has no such loss."""
        return {}

    def calibration(self, model: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Padded batches."""
        return lambda examples: (
            {name: one.cpu() for name, one in self.batch(model, examples).items()} | self.labels(examples)
        )

    def call(self, model: Any, examples: Sequence[Encoded]) -> Any:
        """What the model says of some examples."""
        batch = self.batch(model, examples)
        if "attention_mask" in batch:
            tell_lengths(model, lambda: batch["attention_mask"].sum(1, keepdim=True).float())
        return model(**batch)

    def loss(
        self,
        model: Any,
        examples: Sequence[Encoded],
        *,
        num_items: Tensor | float | None = None,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, LossStats]:
        """The summed loss over `num_items` (None: over the examples' own counts), and the sums."""
        total, right = self.score(self.call(model, examples), examples, label_smoothing)
        stats = LossStats(sum(one.count for one in examples), right.detach().float(), total.detach())
        return total / max(1, stats.targets if num_items is None else num_items), stats

    def path(self, model: Any, config: TrainConfig) -> LossPath:
        """Padded batches."""
        return LossPath("padded batches", self.loss, count=counted, measures=self.measures)

    # -- answers -------------------------------------------------------------------------------------------------------------

    def answers(
        self, model: Any, tokenizer: Any, examples: Sequence[Encoded], config: TrainConfig
    ) -> tuple[list[Any], LossStats]:
        """The answer to each row, in the order of the rows, and the sums of the loss where the examples have labels. Batches
        hold rows of similar length."""
        size, order = (
            config.train.evaluation_batch_size,
            sorted(range(len(examples)), key=lambda at: len(examples[at].input_ids)),
        )
        decoded: list[Any] = [None] * len(examples)
        sums = LossStats()
        with evaluating(model):
            for start in range(0, len(order), size):
                places = order[start : start + size]
                some = [examples[at] for at in places]
                outputs = self.call(model, some)
                if all(one.label is not None for one in some):
                    total, right = self.score(outputs, some, 0.0)
                    sums += LossStats(sum(one.count for one in some), right.float(), total)
                for at, one in zip(places, self.decode(outputs, some, model, tokenizer), strict=True):
                    decoded[at] = one
        return self.combine(examples, decoded), sums

    def examine(
        self, model: Any, tokenizer: Any, held: EvaluationSet, config: TrainConfig, path: LossPath
    ) -> Evaluation:
        """The loss over all rows and the metric of the answers to them."""
        start, examples = time.perf_counter(), list[Any](held.examples)
        given, sums = self.answers(model, tokenizer, examples, config)
        if not sums.targets:
            raise LorakitError(f"evaluate: of {plural(len(examples), 'row')} none has a label that {self.name} can use")
        firsts = list({one.row: one for one in reversed(examples)}.values())[::-1]
        numbers = sums.numbers()
        shown = tuple(
            Answer(one.shown, _plain(one.expected), _plain(answer), self.is_right(answer, one.expected))
            for one, answer in zip(firsts, given, strict=True)
        )
        return Evaluation(
            rows=len(firsts),
            **{name: numbers[name] for name in self.measures},
            metrics=self.metrics(given, [one.expected for one in firsts]),
            seconds=time.perf_counter() - start,
            answers=shown[: config.evaluate.limit],
        )

    def predict(
        self, model: Any, tokenizer: Any, rows: Rows, config: TrainConfig, classes: Sequence[str] | None
    ) -> list[Any]:
        """The answer to each row."""
        prepared = self.prepare(rows, tokenizer, config, classes, asked=True)
        return self.answers(model, tokenizer, prepared.examples, config)[0]


def counted(examples: Iterable[Any]) -> int:
    """The denominator of the loss of some examples."""
    return sum(one.count for one in examples)


def by_rows(examples: Sequence[Encoded], decoded: Sequence[Any]) -> list[list[Any]]:
    """What was decoded of each row's examples, in the order of the rows."""
    found: dict[int, list[Any]] = {}
    for one, what in zip(examples, decoded, strict=True):
        found.setdefault(one.row, []).append(what)
    return list(found.values())


def encoded_text(tokenizer: Any, limit: int, *texts: str) -> tuple[dict[str, list[int]], int]:
    """One text or a pair as the model's inputs, cut to a limit (of a pair the longer is cut), and how many tokens that lost."""
    whole = tokenizer(*texts, verbose=False)
    lost = max(0, len(whole["input_ids"]) - limit)
    if lost:
        whole = tokenizer(*texts, truncation=True, max_length=limit)
    return {name: list(ids) for name, ids in whole.items() if name != "attention_mask"}, lost


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else str(value)
