"""Rows of data, each with the place that it came from: in memory while they are few, in a file while they are many.

`Rows` is what is known of a source (or of several). Its `rows` are a tuple, or `StoredRows`: rows in a nameless temporary file,
which goes with the process, read back one at a time. Both are sequences, and an order of rows is an array of their indices.
"""

from __future__ import annotations

import os
import pickle
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import LorakitError
from lorakit.models.gguf import cache_root

Indices = NDArray[np.int64]

IN_MEMORY = 64 << 20
"""Bytes of files whose rows are kept in memory; those of more are kept in a temporary file."""

CHUNK = 1024
"""Rows that are worked on at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, where it stands ("reviews.jsonl, line 12"), and the number of its source among several."""

    fields: Mapping[str, Any]
    where: str
    source: int = 0


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class StoredRows(Sequence[Row]):
    """Rows in a file. `places` and `sizes` say where each stands, `sources` which source it is of; an order of rows, or some of
    them, is another view of the same file."""

    def __init__(self, file: IO[bytes], places: Indices, sizes: Indices, sources: Indices) -> None:
        self.file, self.places, self.sizes, self.sources = file, places, sizes, sources

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        if isinstance(index, slice):
            return self.pick(np.arange(len(self))[index])
        raw = os.pread(self.file.fileno(), int(self.sizes[index]), int(self.places[index]))
        fields, where = pickle.loads(raw)
        return Row(fields, where, int(self.sources[index]))

    def pick(self, order: Indices) -> StoredRows:
        """The rows with these indices, in this order."""
        return StoredRows(self.file, self.places[order], self.sizes[order], self.sources[order])


@dataclass(frozen=True)
class Rows:
    """The rows of a source, or of several.

    Attributes:
        rows: the readable ones, in order.
        bad: the unreadable ones.
        source: the source in words.
        label_names: the names of a dataset's integer labels, where it has them.
        identity: what tells other content apart, for a cache: hashes and fingerprints, found when asked for.
        names: of several sources, what each is called.
        order: where sources are interleaved, the indices of the rows in the order of training; a row may occur again.
    """

    rows: Sequence[Row]
    bad: tuple[BadRow, ...] = ()
    source: str = ""
    label_names: tuple[str, ...] | None = None
    identity: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    order: Indices | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that any row has, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.fields))

    @property
    def is_stored(self) -> bool:
        """Whether the rows are in a file, being many."""
        return isinstance(self.rows, StoredRows)

    @property
    def sources(self) -> Indices:
        """The source of each row."""
        rows = self.rows
        return rows.sources if isinstance(rows, StoredRows) else np.array([row.source for row in rows], dtype=np.int64)

    def take(self, rows: Sequence[Row], bad: Sequence[BadRow] | None = None) -> Rows:
        """The same source with other rows."""
        rows = rows if isinstance(rows, StoredRows) else tuple(rows)
        return replace(self, rows=rows, bad=self.bad if bad is None else tuple(bad), order=None)

    def pick(self, order: Indices) -> Rows:
        """The rows with these indices, in this order."""
        rows = self.rows
        return self.take(rows.pick(order) if isinstance(rows, StoredRows) else [rows[at] for at in order])

    def of(self, source: int) -> Rows:
        """The rows of one of several sources; the unreadable ones are told apart by nobody."""
        return self.pick(np.flatnonzero(self.sources == source))

    def shuffled(self, seed: int) -> Rows:
        """The rows in an order drawn from `seed`, the same on every machine."""
        order = np.arange(len(self))
        random.Random(seed).shuffle(order)  # type: ignore[arg-type]
        return self.pick(order)

    @property
    def storage(self) -> Indices:
        """The indices of the rows in the order in which they are stored."""
        rows = self.rows
        return np.argsort(rows.places, kind="stable") if isinstance(rows, StoredRows) else np.arange(len(rows))

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[Indices, list[Row]]]:
        """All rows in pieces, each with the indices of its rows: in the order in which they are stored, so that a file is read
        from its beginning to its end."""
        rows, order = self.rows, self.storage
        for start in range(0, len(order), size):
            some = order[start : start + size]
            yield some, [rows[at] for at in some]


class Collected:
    """Rows as they are read, in memory or in a temporary file.

    Args:
        stored: whether they go to a file.
    """

    def __init__(self, stored: bool) -> None:
        self.bad: list[BadRow] = []
        self._rows: list[Row] = []
        self._file = temporary_file() if stored else None
        self._end = 0
        self._facts: list[Indices] = []

    def add(self, found: Iterable[Row | BadRow], source: int = 0) -> int:
        """Take what was read of a source; returns how many rows that was, unreadable ones among them."""
        count, sizes = 0, []
        for count, one in enumerate(found, start=1):  # noqa: B007
            if isinstance(one, BadRow):
                self.bad.append(one)
            elif self._file is None:
                self._rows.append(Row(one.fields, one.where, source) if source else one)
            else:
                raw = pickle.dumps((one.fields, one.where), pickle.HIGHEST_PROTOCOL)
                try:
                    sizes.append(self._file.write(raw))
                except OSError as error:
                    raise LorakitError(
                        f"load_rows: the rows cannot be kept in {cache_root()}: {error.strerror or error}; free some space, or "
                        "name another folder by LORAKIT_CACHE"
                    ) from None
        self._facts.append(np.array([sizes, [source] * len(sizes)], dtype=np.int64))
        return count

    def rows(self) -> Sequence[Row]:
        """All that were readable, in order."""
        if self._file is None:
            return tuple(self._rows)
        self._file.flush()
        sizes, sources = np.concatenate(self._facts, axis=1) if self._facts else np.zeros((2, 0), dtype=np.int64)
        return StoredRows(self._file, np.cumsum(sizes) - sizes, sizes, sources)


def temporary_file() -> IO[bytes]:
    """A file without a name in the cache folder, which no end of the process leaves behind."""
    folder: Path = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)
