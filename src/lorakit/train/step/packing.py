"""Packing: a batch of examples as one row of tokens without padding, in which shared prefixes stand once; and padded batches.

A batch of examples becomes `input_ids [1, tokens]`, so the linear layers of a model see real tokens only. Examples
that begin with the same tokens (a system prompt, an instruction, few-shot examples) share one run: causal
attention never looks ahead, so the hidden states of that run are the same in each of them and one copy is exact. The
runs form a trie; a `Segment` is one of its nodes, and a token attends to the segments above its own.

The loss follows from the same picture. The last token of a shared run predicts the first own token of every example
below it, so targets are a list of (hidden row, token, weight) and not a row of labels: one hidden state may have many
targets. Equal pairs are merged, their weight says how often they occurred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.train.data.tokenise import IGNORED

if TYPE_CHECKING:
    from lorakit.train.data.store import Example

MINIMUM_SHARED = 16
"""A shared run shorter than this costs more in one more attention block than it saves in linear layers."""

ROW_MULTIPLE = 32
"""Rows are filled up to a multiple of this: GEMM kernels are built once per shape, about 1.5 ms each on a CPU."""

TEXT_MULTIPLE = 8
"""Inside an encoder's attention texts are padded to a multiple of this, for the same reason."""


@dataclass(frozen=True)
class Segment:
    """One run of tokens in the packed row: `start`, `length`, first position, and the segment above it (or -1)."""

    start: int
    length: int
    position: int
    parent: int


@dataclass(frozen=True)
class PackedBatch:
    """A packed batch.

    `input_ids` and `position_ids` are `[1, tokens]`; `hidden_index`, `targets` (int64) and `weights` (fp32) are
    `[targets]`: the hidden state at `hidden_index[i]` predicts `targets[i]`, which counts `weights[i]` times. Of the
    row only the first `used` tokens are real; `counts` `[1, tokens]` says how many examples hold each token, 0 for the
    rest. `num_targets` is the number of labels in the examples,
    `labelled` the distinct rows of `hidden_index` and `labelled_place` where among them each target's is,
    `places` the packed row of each token of each example. `asked` are the
    rows that the last block gives, in this order, and then `hidden_index` counts among them; None is every row. `plans` is
    where attention keeps what it works out once per batch, `windows` which sliding windows layers gave it (None: all is seen).
    """

    input_ids: Tensor
    position_ids: Tensor
    hidden_index: Tensor
    targets: Tensor
    weights: Tensor
    counts: Tensor
    segments: tuple[Segment, ...]
    used: int
    num_targets: int
    labelled: Tensor
    labelled_place: Tensor
    places: tuple[list[int], ...] = ()
    asked: Tensor | None = None
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    windows: set[int | None] = field(default_factory=set, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Length of the packed row, fill included."""
        return int(self.input_ids.shape[1])

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        moved: Any = {name: one.to(device) for name, one in vars(self).items() if isinstance(one, Tensor)}
        return replace(self, **moved, plans={})

    def lengths(self) -> Tensor:
        """The tokens of the longest example that holds each token of the row, `[1, tokens]`; infinite for the fill."""
        found = torch.zeros(self.tokens)
        for place in self.places:
            found[place] = found[place].clamp_min(len(place))
        return torch.where(found > 0, found, torch.inf)[None]

    def under(self, rows: int) -> PackedBatch:
        """The batch with so many rows above everything, which no example holds: a trained prompt, computed once for all.

        The rows are the caller's to put in front of the embeddings, and to count in positions; `hidden_index` counts without
        them.
        """
        if ("under", rows) in self.plans:  # every layer of a prefix asks
            known: PackedBatch = self.plans["under", rows]
            return known
        root = Segment(0, rows, 0, -1)
        below = (Segment(one.start + rows, one.length, one.position + rows, one.parent + 1) for one in self.segments)
        ids = torch.cat([self.input_ids.new_zeros(1, rows), self.input_ids], dim=1)
        counts = torch.cat([self.counts.new_zeros(1, rows), self.counts], dim=1)
        lower = replace(self, input_ids=ids, counts=counts, segments=(root, *below), used=self.used + rows, plans={})
        self.plans["under", rows] = lower
        return lower


def pack(
    examples: Sequence[Example],
    *,
    share_prefix: bool = True,
    minimum_shared: int = MINIMUM_SHARED,
    row_multiple: int = ROW_MULTIPLE,
) -> PackedBatch:
    """Pack examples into one row.

    `share_prefix=False` keeps every example whole. A run is shared if it has at least `minimum_shared` tokens; nested
    runs are found too. The order of examples does not matter to the result of training and is not kept. Empty examples
    are skipped; if nothing is left, ValueError is raised.
    """
    rows = [list(example.input_ids) for example in examples]
    for row, example in zip(rows, examples, strict=True):
        if len(row) != len(example.labels):
            raise ValueError(
                f"pack: an example has {len(row)} tokens and {len(example.labels)} labels; they must agree"
            )
    members = [i for i, row in enumerate(rows) if row]
    if not members:
        raise ValueError("pack: no example has a token; give at least one that has")

    trie = _Trie(rows, minimum_shared)
    if share_prefix:
        trie.grow(members, 0, 0, -1)
    else:
        for member in members:
            trie.add(member, 0, len(rows[member]), -1, [member])

    input_ids: list[int] = []
    position_ids: list[int] = []
    for (source, begin, end), segment in zip(trie.sources, trie.segments, strict=True):
        input_ids += rows[source][begin:end]
        position_ids += range(segment.position, segment.position + segment.length)
    used = len(input_ids)

    counts: dict[tuple[int, int], int] = {}
    num_targets = 0
    places = {member: trie.rows_of(member) for member in members}
    for member, row_of in places.items():
        for position, label in enumerate(examples[member].labels):
            if position and label != IGNORED:
                key = (row_of[position - 1], label)
                counts[key] = counts.get(key, 0) + 1
                num_targets += 1

    fill = -used % row_multiple
    held = torch.zeros(used + fill)
    for row_of in places.values():
        held[row_of] += 1
    # The fill repeats a real token: it is computed, read by nobody, and gets no gradient.
    input_ids += [input_ids[-1]] * fill
    position_ids += [0] * fill
    pairs = sorted(counts)
    labelled = sorted({row for row, _ in pairs})
    place_of = {row: place for place, row in enumerate(labelled)}
    return PackedBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        hidden_index=torch.tensor([row for row, _ in pairs], dtype=torch.long),
        targets=torch.tensor([token for _, token in pairs], dtype=torch.long),
        weights=torch.tensor([float(counts[pair]) for pair in pairs]),
        counts=held[None],
        segments=tuple(trie.segments),
        used=used,
        num_targets=num_targets,
        labelled=torch.tensor(labelled, dtype=torch.long),
        labelled_place=torch.tensor([place_of[row] for row, _ in pairs], dtype=torch.long),
        places=tuple(places.values()),
    )


def pad_rows(rows: Sequence[Sequence[int]], value: int = 0, left: bool = False) -> Tensor:
    """Rows of token ids as one tensor `[rows, longest]`, filled up with `value`: on the right, or on the left."""
    longest = max(map(len, rows))
    fills = ([value] * (longest - len(row)) for row in rows)
    return torch.tensor([[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, fills, strict=True)])


def mask_of(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """The attention mask of `pad_rows`: 1 at tokens, 0 at padding."""
    return pad_rows([[1] * len(row) for row in rows], left=left)


def pad(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples as one right-padded batch: input_ids, attention_mask and labels, each `[examples, longest]`."""
    ids = [example.input_ids for example in examples]
    labels = pad_rows([example.labels for example in examples], IGNORED)
    return {"input_ids": pad_rows(ids), "attention_mask": mask_of(ids), "labels": labels}


@dataclass(frozen=True)
class PackedTexts:
    """Whole texts one after another, for an encoder: nothing is shared, since every token looks both ways.

    `input_ids` and `position_ids` are `[1, tokens]`. Padded to `[texts, longest]`, token t of the row stands at `place[t]`;
    `hidden` `[texts, 1, longest]` is true where padding stands. `first` is the row of each text's first token. The row is
    filled up with texts of its first token, which count among the texts in here and are in `first` no more.
    """

    input_ids: Tensor
    position_ids: Tensor
    place: Tensor
    hidden: Tensor
    first: Tensor
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Length of the packed row, fill included."""
        return int(self.input_ids.shape[1])


def pack_texts(
    rows: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    first_position: int = 0,
    row_multiple: int = ROW_MULTIPLE,
) -> PackedTexts:
    """Texts as one packed row. `first_position` is the position of a text's first token, 0 for most encoders.

    Raises ValueError for a text without tokens, which has no first token to read a class from.
    """
    if not rows or not all(rows):
        raise ValueError("pack: a text has no token; leave it out, or give it its opening token")
    longest = -(-max(map(len, rows)) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    fill = -sum(map(len, rows)) % row_multiple
    filled = [*rows, *([rows[0][0]] * min(longest, fill - begin) for begin in range(0, fill, longest))]
    lengths = torch.tensor([len(row) for row in filled])
    step = torch.arange(longest)
    real = step[None] < lengths[:, None]
    return PackedTexts(
        input_ids=torch.tensor([[token for row in filled for token in row]], device=device),
        position_ids=(step.expand(len(filled), -1)[real] + first_position)[None].to(device),
        place=real.view(-1).nonzero()[:, 0].to(device),
        hidden=~real[:, None].to(device),
        first=(lengths.cumsum(0) - lengths)[: len(rows)].to(device),
    )


class _Trie:
    """Segments in the order in which they lie in the row, a parent always before its children."""

    def __init__(self, rows: list[list[int]], minimum_shared: int) -> None:
        self.rows = rows
        self.minimum_shared = minimum_shared
        self.segments: list[Segment] = []
        self.sources: list[tuple[int, int, int]] = []
        self.runs_of: dict[int, list[int]] = {}
        self.length = 0

    def add(self, example: int, begin: int, end: int, parent: int, members: list[int]) -> int:
        """One more segment: tokens `begin:end` of `example`, which all `members` share."""
        node = len(self.segments)
        self.segments.append(Segment(self.length, end - begin, begin, parent))
        self.sources.append((example, begin, end))
        self.length += end - begin
        for member in members:
            self.runs_of.setdefault(member, []).append(node)
        return node

    def grow(self, members: list[int], begin: int, depth: int, parent: int) -> None:
        """Place `members`, which agree on their first `depth` tokens, the first `begin` of them placed already."""
        rows = self.rows
        shortest = min(len(rows[member]) for member in members)
        first = rows[members[0]]
        while depth < shortest and all(rows[member][depth] == first[depth] for member in members):
            depth += 1
        if len(members) == 1 or (depth - begin >= self.minimum_shared):
            if depth > begin:
                parent = self.add(members[0], begin, depth, parent, members)
            begin = depth
        branches: dict[int, list[int]] = {}
        for member in members:
            if depth < len(rows[member]):
                branches.setdefault(rows[member][depth], []).append(member)
            elif depth > begin:
                self.add(member, begin, depth, parent, [member])
        for branch in branches.values():
            self.grow(branch, begin, depth, parent)

    def rows_of(self, member: int) -> list[int]:
        """The packed row of each token of an example, in the example's own order."""
        result: list[int] = []
        for node in self.runs_of[member]:
            segment = self.segments[node]
            result += range(segment.start, segment.start + segment.length)
        return result
