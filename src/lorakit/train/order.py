"""The order in which examples come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class ByLength(Sampler[int]):
    """Examples in random order, but with those of similar length in the same batch; the longest come first, so that a run that
    does not fit into memory ends at once. Each epoch has an order of its own, which a resumed run finds again.

    Args:
        lengths: of all examples, in tokens.
        together: examples that make one optimiser step.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], together: int, seed: int) -> None:
        self.lengths, self.together, self.seed, self.epoch = list(lengths), together, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order: Any = get_length_grouped_indices
        return iter(order(self.lengths, self.together, generator=generator))
