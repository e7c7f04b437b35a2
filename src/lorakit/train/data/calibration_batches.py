"""Training examples as the batches that an informed start measures the model on.

The examples are drawn at random, by the run's seed, and laid out as any Hugging Face model takes them: padded on the
right, with a mask, labels beside them. Examples of like length share a batch, so that little of it is padding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorakit.train.data.blocks import documents
from lorakit.train.step.packing import pad

if TYPE_CHECKING:
    from lorakit.init import Initialiser

ROWS = 8
"""Examples in a batch."""


def calibration_batches(
    examples: Sequence[Any],
    start: Initialiser,
    seed: int = 0,
    batch: Callable[[Sequence[Any]], dict[str, Tensor]] = pad,
    rows: int = ROWS,
) -> list[dict[str, Tensor]] | None:
    """The batches that a start asks for, or None where it measures nothing.

    Args:
        examples: what the run trains on; the start's `examples` says how many of them are used.
        start: the initialiser.
        seed: decides which examples, and the order of the batches.
        batch: the model's arguments for some examples.
        rows: examples in a batch.
    """
    if start.needs not in ("inputs", "gradients"):
        return None
    draw = random.Random(seed)
    wanted: Any = start
    chosen = draw.sample(range(len(examples)), min(wanted.examples, len(examples)))
    by_length = sorted(chosen, key=lambda index: (len(examples[index].input_ids), index))
    batches = [
        batch(documents(examples[index] for index in by_length[first : first + rows]))
        for first in range(0, len(by_length), rows)
    ]
    draw.shuffle(batches)  # a start that stops early must not have seen the short ones alone
    return batches
