"""Rows that are read as they come, pass after pass, for data that are to be kept nowhere.

The first rows of each source decide formats and templates, and are what a check shows. Rows are drawn at random from a buffer,
by a seed of each pass; so the same options give the same examples in the same order, and a run that resumes skips what it has
seen exactly.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from lorakit.errors import LorakitError
from lorakit.train.config.options import DataOptions
from lorakit.train.data.examples import Prepared, makers_of, prepare
from lorakit.train.data.reading import read_all, streamed_origins
from lorakit.train.data.rows import BadRow, Row, Rows
from lorakit.train.data.store import Example

log = logging.getLogger("lorakit.train")

AT_ONCE = 64
"""Rows that are tokenised at once."""


def streamed(head: Rows, tokenizer: Any, options: DataOptions) -> Prepared:
    """The examples of all rows, as they come; the report is that of the first rows.

    Raises:
        LorakitError: as `prepare`; several processes, which would all see the same rows.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LorakitError("data.streaming: several processes would all see the same rows; use one, or turn it off")
    examples: Any = Streamed(head, tokenizer, options)
    return replace(prepare(head, tokenizer, options), examples=examples)


class Streamed(IterableDataset[Example]):
    """The examples of rows that are read as they come, without end."""

    def __init__(self, head: Rows, tokenizer: Any, options: DataOptions) -> None:
        self.options, self.makers = options, makers_of(head, tokenizer, options)
        self.sources = streamed_origins(options)
        self.skipped = 0

    def digest(self) -> str:
        """A hash of which files are read, how large they are, and in what order."""
        sizes = [[origin.nbytes for origin in origins] for _, origins in self.sources]
        about = [sizes, self.options.model_dump(mode="json", exclude={"cache"})]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def __iter__(self) -> Iterator[Example]:
        for number in itertools.count():
            found = 0
            rows = self._shuffled(itertools.islice(self._pass(number), self.options.limit), number)
            while some := list(itertools.islice(rows, AT_ONCE)):
                for example in self._examples(some):
                    found += 1
                    yield example
            if not found:
                raise LorakitError("data.streaming: no row gives an example")

    def _examples(self, rows: list[Row]) -> list[Example]:
        made: dict[int, list[Example]] = {id(row): [] for row in rows}
        bad: list[BadRow] = []
        for number, maker in self.makers.items():
            for row, ids, labels in maker.examples([row for row in rows if row.source == number], bad):
                made[id(row)].append(Example(ids, labels))
        for one in bad:
            self._refuse(one)
        return [example for examples in made.values() for example in examples]

    def _refuse(self, bad: BadRow) -> None:
        if self.options.on_bad_row == "raise":
            raise LorakitError(
                f"data.streaming: a row cannot be used: {bad}\nCorrect it, or leave such rows out by data.on_bad_row: skip."
            )
        self.skipped += 1
        if self.skipped <= 5:
            log.warning("skipped %s%s", bad, "; further ones are not named" if self.skipped == 5 else "")

    def _pass(self, number: int) -> Iterator[Row]:
        """All rows once, or as sources are drawn."""
        for one in self._concatenated() if self.options.mix == "concatenate" else self._interleaved(number):
            if isinstance(one, BadRow):
                self._refuse(one)
            else:
                yield one

    def _concatenated(self) -> Iterator[Row | BadRow]:
        return itertools.chain.from_iterable(read_all(origins, at) for at, (_, origins) in enumerate(self.sources))

    def _interleaved(self, number: int) -> Iterator[Row | BadRow]:
        seed = (self.options.shuffle_seed or 0, number)
        drawing, open_ones = random.Random(str(seed)), set(range(len(self.sources)))
        reading = [read_all(origins, at) for at, (_, origins) in enumerate(self.sources)]
        while True:
            [at] = drawing.choices(range(len(reading)), self.options.weights)
            one = next(reading[at], None)
            if one is None:
                open_ones.discard(at)
                if self.options.mix == "first-exhausted" or not open_ones:
                    return
                reading[at] = read_all(self.sources[at][1], at)
                one = next(reading[at])
            yield one

    def _shuffled(self, rows: Iterator[Row], number: int) -> Iterator[Row]:
        """The rows, each drawn from a buffer of those read before it; in their order without a seed."""
        if self.options.shuffle_seed is None:
            yield from rows
            return
        drawing = np.random.RandomState((self.options.shuffle_seed, number))  # its stream never changes
        held = list(itertools.islice(rows, self.options.shuffle_buffer))
        for row in rows:
            at = drawing.randint(len(held))
            yield held[at]
            held[at] = row
        drawing.shuffle(held)  # type: ignore[arg-type]
        yield from held
