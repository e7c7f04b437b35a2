"""Packing to a length: texts one after another, cut into blocks of exactly that many tokens.

Every token occurs in one block, and only there. A text that does not end where a block ends goes on in the next. The last
block holds what is left, which may be less. Where attention does not cross from one text into the next, a block is its texts
(and pieces of texts), each read alone from position 0; the first token of each has then no label: nothing predicts it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from lorakit.train.data.rows import Indices
from lorakit.train.data.store import Example, Examples, example_of


@dataclass(frozen=True)
class Block(Example):
    """A block of texts that do not see each other: its tokens one after another, and the texts as examples."""

    texts: tuple[Example, ...] = ()


class Blocks(Sequence[Example]):
    """The blocks of `size` tokens that texts make in their order; `crosses` where attention crosses from text to text;
    `learned` counts the learned tokens of the texts.

    Attributes:
        pieces: the texts, cut where a block ends.
        edges: the first piece of each block, and the end.
        leftover: tokens of the last block if it is not full, else 0.
        label_tokens: tokens that carry loss.
    """

    def __init__(self, texts: Examples, size: int, crosses: bool, learned: int) -> None:
        ends = np.cumsum(texts.lengths)
        begins = ends - texts.lengths
        total = int(ends[-1])
        cuts = np.union1d(begins[texts.lengths > 0], np.arange(0, total, size))  # where a piece begins
        text = np.searchsorted(ends, cuts, side="right")
        starts = texts.starts[text] + (cuts - begins[text])
        lengths = np.diff(cuts, append=total)
        self.pieces, self.crosses = Examples(texts.tokens, starts, lengths, texts.content), crosses
        places = np.arange(0, total, size)
        self.edges: Indices = np.append(np.searchsorted(cuts, places), len(cuts))
        self.lengths: Indices = np.minimum(size, total - places)
        self.leftover = total % size
        alone = starts[self.edges[:-1]] if crosses else starts  # tokens that nothing before them predicts
        self.label_tokens = learned - int(np.count_nonzero(texts.tokens[alone] >= 0))
        texts.forget()

    @property
    def longest(self) -> int:
        """Tokens of the longest block."""
        return int(self.lengths.max())

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        pieces = [self.pieces.tokens_of(one) for one in range(self.edges[at], self.edges[at + 1])]
        if self.crosses:
            return example_of(np.concatenate(pieces))
        texts = tuple(example_of(one) for one in pieces)
        return Block([i for one in texts for i in one.input_ids], [i for one in texts for i in one.labels], texts)

    def digest(self) -> str:
        """A hash of the tokens and labels of all blocks in their order."""
        about = (self.pieces.digest(), self.crosses, self.edges.tolist())
        return hashlib.sha256(repr(about).encode()).hexdigest()


def documents(examples: Iterable[Example]) -> list[Example]:
    """Examples, blocks of texts that do not see each other as these texts: what a model is given."""
    return [text for one in examples for text in getattr(one, "texts", ()) or (one,)]
