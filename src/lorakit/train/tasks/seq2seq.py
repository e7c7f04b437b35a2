"""Text to text by an encoder-decoder: summaries, corrections, translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.models.evaluating import evaluating
from lorakit.train import metrics
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.evaluate import normalise
from lorakit.train.step.loss import LossStats
from lorakit.train.step.packing import pad_rows
from lorakit.train.tasks.classification import class_sums
from lorakit.train.tasks.contract import Columns, PaddedTask, encoded_text

if TYPE_CHECKING:
    from lorakit.train.config.run import TrainConfig


class Seq2Seq(PaddedTask):
    """The target is not shifted: the model makes its decoder's input of it, behind the start token of its configuration."""

    name = "seq2seq"
    columns: ClassVar[Columns] = {
        "source": ("source", "article", "document", "translation", "prompt", "input"),
        "target": ("target", "highlights", "summary", "translation", "completion", "output"),
    }
    answer = ("target",)
    learned = "targets"
    measures = ("loss", "perplexity", "token_accuracy")

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        pair = values.get("translation")
        if isinstance(pair, Mapping):  # {"en": ..., "de": ...}: from the first to the second
            texts = [one for one in pair.values() if isinstance(one, str)]
            values = {"source": texts[0] if texts else None, "target": texts[1] if len(texts) > 1 else None}
        return self.text(values, "source"), None if asked else self.text(values, "target")

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        source, target = given
        inputs, lost = encoded_text(tokenizer, limit, source)
        inputs = {"input_ids": inputs["input_ids"]}
        if target is None:
            return [Encoded(inputs, shown=source, cut=lost)]
        labels = list(tokenizer(text_target=target, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        labels += [end] if end is not None and labels[-1:] != [end] else []
        more = max(0, len(labels) - limit)
        labels = labels[: limit - 1] + labels[-1:] if more else labels
        return [Encoded(inputs, labels, len(labels), expected=target, shown=source, cut=lost + more)]

    def call(self, model: Any, examples: Sequence[Encoded]) -> Any:
        if any(one.label is None for one in examples):
            return None  # only asked: the answer is generated
        batch = self.batch(model, examples)
        labels = pad_rows([one.label for one in examples], IGNORED).to(batch["input_ids"].device)
        return model(**batch, decoder_input_ids=decoder_inputs(model, labels), use_cache=False)

    def labels(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        return {"labels": pad_rows([one.label for one in examples], IGNORED)}

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        labels = pad_rows([one.label for one in examples], IGNORED).to(outputs.logits.device)
        chosen = labels != IGNORED
        return class_sums(outputs.logits[chosen], labels[chosen], smoothing)

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        return [None] * len(examples)

    def answers(
        self, model: Any, tokenizer: Any, examples: Sequence[Encoded], config: TrainConfig
    ) -> tuple[list[Any], LossStats]:
        """The loss of the targets, and generated answers: greedy, at most `evaluate.max_new_tokens` long."""
        _, sums = super().answers(model, tokenizer, examples, config)
        size = config.train.evaluation_batch_size
        order = sorted(range(len(examples)), key=lambda at: len(examples[at].input_ids))
        given: list[Any] = [None] * len(examples)
        with evaluating(model):
            for start in range(0, len(order), size):
                places = order[start : start + size]
                batch = self.batch(model, [examples[at] for at in places])
                written = model.generate(
                    **batch, max_new_tokens=config.evaluate.max_new_tokens, do_sample=False, num_beams=1
                )
                texts = tokenizer.batch_decode(written, skip_special_tokens=True)
                for at, text in zip(places, texts, strict=True):
                    given[at] = text.strip()
        return given, sums

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        exact = metrics.accuracy([normalise(one) for one in given], [normalise(one) for one in expected])
        return {"exact_match": exact, **metrics.rouge(given, expected)}

    def is_right(self, given: Any, expected: Any) -> bool:
        return normalise(given) == normalise(expected)


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Labels shifted right by one behind the decoder's start token, padding for what is not learned.

    Raises:
        LorakitError: the model's configuration has no start token for the decoder.
    """
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(getattr(model, "generation_config", None), "decoder_start_token_id", None)
    if start is None:
        raise LorakitError(
            f"seq2seq: the configuration of {type(model).__name__} has no decoder_start_token_id; set it there (T5: the "
            "padding token, BART: the end token, mBART: the language)"
        )
    pad = int(getattr(model.config, "pad_token_id", None) or 0)
    first = torch.full_like(labels[:, :1], start)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)], dim=1)
