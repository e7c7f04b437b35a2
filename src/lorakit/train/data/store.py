"""Tokenised examples as flat arrays: of many rows in a file, mapped into memory, kept in a cache for the next run.

A token is one int32: its id where it is learned, the id's complement (`~id`, which is negative) where it is not. So a label is
the token itself or none, and an example is a start and a length. An order of examples, or some of them, is another view of the
same tokens; nothing is ever a list of everything.

A cache entry is a folder of its own, named by a hash of everything that decides its content: `tokens.bin`,
`examples.npy` (row, length, learned tokens and mark of each) and `facts.json`. It is written aside and moved into place whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import LorakitError
from lorakit.models.gguf import cache_root
from lorakit.train.data.rows import Indices
from lorakit.train.data.tokenise import IGNORED

log = logging.getLogger("lorakit.train")

Tokens = NDArray[np.int32]

CACHE_FORMAT = 1
"""Part of the name of a cache entry: raise it when rows become other tokens, or are written in another way."""


@dataclass(frozen=True)
class Example:
    """One tokenised example; `labels[t]` is predicted from the tokens before position t, -100 means no loss."""

    input_ids: list[int]
    labels: list[int]


class Examples(Sequence[Example]):
    """Examples in a flat array of tokens: example i is `tokens[starts[i] : starts[i] + lengths[i]]`. `content` is
    the hash of the tokens."""

    def __init__(self, tokens: Tokens, starts: Indices, lengths: Indices, content: str) -> None:
        self.tokens, self.starts, self.lengths, self.content = tokens, starts, lengths, content

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.pick(np.arange(len(self))[index])
        return example_of(self.tokens_of(index))

    def __eq__(self, other: object) -> bool:
        """Whether all examples are equal, as two lists of them would be."""
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self.digest())

    def tokens_of(self, index: int) -> Tokens:
        """The tokens of an example as they are stored."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]

    def pick(self, order: Indices) -> Examples:
        """The examples with these indices, in this order."""
        return Examples(self.tokens, self.starts[order], self.lengths[order], self.content)

    def digest(self) -> str:
        """A hash of the tokens and labels of all examples in their order."""
        digest = hashlib.sha256(self.content.encode())
        for part in (self.starts, self.lengths):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def forget(self) -> None:
        """Give back the memory of what was read through the map; it is read again when it is needed."""
        held = getattr(self.tokens, "_mmap", None)
        if held is not None and hasattr(mmap, "MADV_DONTNEED"):
            held.madvise(mmap.MADV_DONTNEED)


def example_of(tokens: Tokens, first: bool = True) -> Example:
    """The example of stored tokens; the first has no label, since nothing predicts it (`first`)."""
    labels = np.where(tokens < 0, IGNORED, tokens)
    if first:
        labels[:1] = IGNORED
    return Example(np.where(tokens < 0, ~tokens, tokens).tolist(), labels.tolist())


def lengths_of(examples: Sequence[Any]) -> Sequence[int]:
    """Tokens of each example."""
    known = getattr(examples, "lengths", None)
    return [len(one.input_ids) for one in examples] if known is None else known


@dataclass(frozen=True)
class Made:
    """Examples as they were built: the number of the row of each, how many of its tokens carry loss, a
    number by which equal examples are known, and what is told."""

    examples: Examples
    owners: Indices
    labels: Indices
    marks: Indices
    facts: dict[str, Any]

    def repeated(self, which: Indices) -> int:
        """How many of these examples have the tokens and labels of another."""
        return len(which) - len(np.unique(self.marks[which]))

    def order(self, rows: Indices | None) -> Indices:
        """The examples in the order of their rows, or of indices of rows in which one may occur again."""
        place = np.argsort(self.owners, kind="stable")
        if rows is None:
            return place
        owners = self.owners[place]
        first, last = np.searchsorted(owners, rows), np.searchsorted(owners, rows, side="right")
        counts = last - first
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found: Indices = place[np.repeat(first, counts) + inside]
        return found


class Builder:
    """Takes examples one by one, into memory or into a file. `rows` counts the rows that they are made of."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self.file, self.rows = file, 0
        self._tokens = array("i")
        self._owners, self._lengths, self._labels, self._marks = (array("q") for _ in range(4))
        self._hash = hashlib.sha256()
        self._shared: Tokens | None = None

    def add(self, owner: int, ids: Sequence[int], labels: Sequence[int]) -> None:
        """One example of a row; a label is the token at its place or -100."""
        tokens = np.asarray(ids, dtype=np.int32)
        learned = np.asarray(labels, dtype=np.int32) != IGNORED
        raw = np.where(learned, tokens, ~tokens).tobytes()
        self._hash.update(raw)
        self._tokens.frombytes(raw)
        self._owners.append(owner)
        self._lengths.append(len(tokens))
        self._labels.append(int(np.count_nonzero(learned)))
        self._marks.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), signed=True))
        self._note_shared(tokens)
        if self.file is not None and len(self._tokens) > 1 << 20:
            self._write()

    def _note_shared(self, tokens: Tokens) -> None:
        if self._shared is None:
            self._shared = tokens
        elif len(self._shared):
            shorter = min(len(self._shared), len(tokens))
            other = np.flatnonzero(self._shared[:shorter] != tokens[:shorter])
            self._shared = self._shared[: other[0] if len(other) else shorter]

    def take_shared(self) -> int:
        """With how many equal tokens all examples since the last call begin."""
        shared, self._shared = self._shared, None
        return 0 if shared is None else len(shared)

    def _write(self) -> None:
        assert self.file is not None
        self._tokens.tofile(self.file)
        self._tokens = array("i")

    def made(self, facts: dict[str, Any]) -> Made:
        """All of them, with `facts` about them."""
        if self.file is None:
            tokens = np.frombuffer(self._tokens, dtype=np.int32) if len(self._tokens) else np.zeros(0, dtype=np.int32)
        else:
            self._write()
            self.file.flush()
            tokens = mapped(self.file)
        kept = (self._owners, self._lengths, self._labels, self._marks)
        owners, lengths, labels, marks = (np.array(one, dtype=np.int64) for one in kept)
        examples = Examples(tokens, np.cumsum(lengths) - lengths, lengths, self._hash.hexdigest())
        return Made(examples, owners, labels, marks, facts)


def mapped(file: IO[bytes] | Path) -> Tokens:
    """The tokens of a file, mapped into memory."""
    size = file.stat().st_size if isinstance(file, Path) else os.fstat(file.fileno()).st_size
    return np.memmap(file, dtype=np.int32, mode="r") if size else np.zeros(0, dtype=np.int32)


def folder_of(key: str) -> Path:
    """Where the cache keeps what has this key."""
    return cache_root() / "tokens" / key[:32]


def cached(key: str) -> Made | None:
    """What the cache has under this key."""
    folder = folder_of(key)
    try:
        facts = json.loads((folder / "facts.json").read_text())
        owners, lengths, labels, marks = np.load(folder / "examples.npy")
        tokens = mapped(folder / "tokens.bin")
    except (OSError, ValueError):
        return None
    if len(tokens) != lengths.sum():
        log.warning("the cache in %s is damaged and is made again", folder)
        return None
    log.info(
        "using the tokens cached in %s (data.cache: off reads the rows anew; delete the folder to clear it)", folder
    )
    examples = Examples(tokens, np.cumsum(lengths) - lengths, lengths, facts.pop("content"))
    return Made(examples, owners, labels, marks, facts)


@contextlib.contextmanager
def being_cached(key: str) -> Iterator[tuple[IO[bytes], Any]]:
    """The file into which the tokens of a new entry are written, and what completes the entry: `keep(made)`.

    Raises:
        LorakitError: the disk is full, or the folder cannot be written.
    """
    folder = folder_of(key)
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))

        def keep(made: Made) -> None:
            assert aside is not None
            np.save(aside / "examples.npy", np.stack([made.owners, made.examples.lengths, made.labels, made.marks]))
            (aside / "facts.json").write_text(json.dumps({**made.facts, "content": made.examples.content}))
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was faster: its entry is the same
                aside.rename(folder)
            log.info(
                "tokens cached in %s (%.1f MB); delete the folder to clear it",
                folder,
                made.examples.tokens.nbytes / 1e6,
            )

        with (aside / "tokens.bin").open("w+b") as file:
            yield file, keep
    except OSError as error:
        raise LorakitError(
            f"prepare: the tokenised rows cannot be kept in {folder.parent}: {error.strerror or error}; free some space, name "
            "another folder by LORAKIT_CACHE, or set data.cache: off (four bytes of memory a token)"
        ) from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
