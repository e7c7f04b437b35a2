"""A causal model small enough for a test, rows for it, and an end in the middle of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

VOCABULARY = 61


@dataclass(frozen=True)
class Row:
    """What the training step reads of an example."""

    input_ids: list[int]
    labels: list[int]


def llama(dtype: torch.dtype = torch.float32, layers: int = 2) -> LlamaForCausalLM:
    """A Llama with random weights, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def rows(count: int, seed: int = 1, prefix: int = 0) -> list[Row]:
    """Rows of unequal lengths; each counts upwards by its own step, so there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length, start, step = (
            int(torch.randint(*span, (1,), generator=generator)) for span in ((6, 16), (0, 61), (1, 4))
        )
        ids = list(range(prefix)) + [(start + step * i) % VOCABULARY for i in range(length)]
        first = prefix + 2
        made.append(Row(ids, [-100] * first + ids[first:]))
    return made


class InterruptionError(Exception):
    """A run was stopped on purpose."""


class InterruptAt(TrainerCallback):
    """Stops a run at the end of a step, as a killed process would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise InterruptionError
