"""Masked language modelling: words of a text that are hidden from an encoder."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lorakit.train.data.encoded import Encoded
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.step.packing import pad_rows
from lorakit.train.tasks.classification import class_sums
from lorakit.train.tasks.contract import Columns, PaddedTask, encoded_text

SHARE = 0.15
"""Of a text's tokens, those that are asked; of these 80% are masked, 10% another token, 10% as they are (BERT)."""


@dataclass(frozen=True)
class _Hidden:
    """What is asked of a text: which places may be masked, by which token, and of how many others one may be put there."""

    places: list[int]
    mask: int
    vocabulary: int


class MaskedLm(PaddedTask):
    """Training hides other words at every pass; evaluation always hides the same ones of a text."""

    name = "masked-lm"
    columns: ClassVar[Columns] = {"text": ("text", "sentence", "content")}
    head = "missing"
    learned = "masked tokens"
    measures = ("loss", "perplexity", "token_accuracy")

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        return self.text(values, "text"), asked

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        text, asked = given
        inputs, lost = encoded_text(tokenizer, limit, text)
        ids = inputs["input_ids"]
        if asked:
            return [Encoded(inputs, about=tokenizer.mask_token_id, shown=text, cut=lost)]
        special = set(tokenizer.all_special_ids)
        places = [place for place, token in enumerate(ids) if token not in special]
        count = max(1, round(SHARE * len(places))) if places else 0
        hidden = _Hidden(places, tokenizer.mask_token_id, len(tokenizer))
        return [Encoded(inputs, ids, count, about=hidden, expected=text, shown=text, cut=lost)]

    def call(self, model: Any, examples: Sequence[Encoded]) -> Any:
        if any(one.label is None for one in examples):
            return super().call(model, examples)
        drawn = [_draw(one, model.training) for one in examples]
        hidden = [Encoded({**one.inputs, "input_ids": ids}) for one, (ids, _) in zip(examples, drawn, strict=True)]
        outputs = super().call(model, hidden)
        outputs["asked"] = pad_rows([labels for _, labels in drawn], IGNORED).to(outputs.logits.device)
        return outputs

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        labels = outputs["asked"]
        chosen = labels != IGNORED
        return class_sums(outputs.logits[chosen], labels[chosen], smoothing)

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        """The likeliest word at each mask that a text has."""
        best = outputs.logits.argmax(-1).tolist()
        return [
            [tokenizer.decode([row[at]]).strip() for at, token in enumerate(one.input_ids) if token == one.about]
            for row, one in zip(best, examples, strict=True)
        ]

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        return {}


def _draw(example: Encoded, training: bool) -> tuple[list[int], list[int]]:
    """The tokens with some hidden, and the labels of these: drawn from torch's random state in training, which a resumed run
    finds again; else by the content of the text."""
    hidden: _Hidden = example.about
    ids = list(example.input_ids)
    seed = int(torch.randint(0, 2**62, ()).item()) if training else zlib.crc32(repr(ids).encode())
    draw = np.random.default_rng(seed)
    chosen = draw.choice(len(hidden.places), size=example.count, replace=False)
    labels = [IGNORED] * len(ids)
    for place in (hidden.places[at] for at in sorted(chosen.tolist())):
        labels[place] = ids[place]
        kind = draw.random()
        ids[place] = hidden.mask if kind < 0.8 else int(draw.integers(hidden.vocabulary)) if kind < 0.9 else ids[place]
    return ids, labels
