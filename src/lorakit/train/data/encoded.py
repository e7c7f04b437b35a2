"""One row of a task as its model takes it: what the model is called with, and what its answer is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.train.data.tokenise import IGNORED


@dataclass(frozen=True)
class Encoded:
    """One row, or one window of a long one.

    Attributes:
        inputs: the model's arguments by name: lists of integers, which a batch pads, or tensors of one shape, which it stacks.
        label: what the task's loss reads; None where the row is only asked.
        count: how much the row adds to the denominator of the loss.
        row: the number of its row.
        about: what the task needs to turn an answer of the model into one of the row (offsets, words).
        expected: the row's answer as its columns have it, for the metric.
        shown: the row in words.
        cut: tokens that it lost to the length limit.
    """

    inputs: Mapping[str, Any]
    label: Any = None
    count: int = 1
    row: int = 0
    about: Any = field(default=None, compare=False)
    expected: Any = field(default=None, compare=False)
    shown: str = field(default="", compare=False)
    cut: int = field(default=0, compare=False)

    @property
    def input_ids(self) -> Sequence[int]:
        """The row's tokens, for whatever counts or hashes them; none where a model reads no tokens."""
        found: Sequence[int] = self.inputs.get("input_ids", ())
        return found

    @property
    def labels(self) -> list[Any]:
        """The label behind a first token that has none, and the inputs that are no tokens, for whatever hashes them."""
        rest = [value for name, value in self.inputs.items() if name != "input_ids"]
        return [IGNORED, self.label, self.count, *([rest] if rest else [])]
