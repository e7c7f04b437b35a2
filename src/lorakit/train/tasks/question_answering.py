"""Answers that stand in a context: where one begins and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.train import metrics
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.templates import UnusableRow
from lorakit.train.tasks.classification import class_sums
from lorakit.train.tasks.contract import Columns, PaddedTask, by_rows

LONGEST = 30
"""Tokens of the longest answer that is given, as SQuAD's scripts have it."""
BEST = 20
"""Begins and ends that are tried with each other."""


class QuestionAnswering(PaddedTask):
    """A context that is too long is read in windows, each overlapping the last by a quarter. A window without the answer is
    learned to point at its first token, which also means that there is none."""

    name = "question-answering"
    columns: ClassVar[Columns] = {
        "question": ("question",),
        "context": ("context", "passage"),
        "answers": ("answers", "answer"),
    }
    answer = ("answers",)
    head = "outside"
    learned = "begin and end of each answer"

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        question, context = self.text(values, "question"), self.text(values, "context")
        if asked:
            return question, context, None
        given = self.get(values, "answers")
        if isinstance(given, str):
            given = {"text": [given], "answer_start": [values.get("answer_start", context.find(given))]}
        if isinstance(given, list):  # one dictionary for each answer
            given = {name: [one.get(name) for one in given] for name in ("text", "answer_start")}
        if not isinstance(given, Mapping) or len(given.get("text", ())) != len(given.get("answer_start", ())):
            raise UnusableRow(f'"answers" is {given!r:.40}, expected text and answer_start, as many of each')
        pairs = [(str(text), int(start)) for text, start in zip(given["text"], given["answer_start"], strict=True)]
        for text, start in pairs:
            if context[start : start + len(text)] != text or start < 0:
                raise UnusableRow(f"the answer {text!r:.40} does not stand in the context at {start}")
        return question, context, pairs

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        question, context, pairs = given
        asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        stride = max(0, min((limit - asked) // 4, limit - asked - 8))
        windows = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=limit,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        about = ("attention_mask", "offset_mapping", "overflow_to_sample_mapping")
        names = [name for name in windows if name not in about]
        made = []
        for number in range(len(windows["input_ids"])):
            inputs = {name: list(windows[name][number]) for name in names}
            sides = windows.sequence_ids(number)
            offsets = [
                (begin, end) if side == 1 else None
                for side, (begin, end) in zip(sides, windows["offset_mapping"][number], strict=True)
            ]
            label = None if pairs is None else _span(offsets, pairs)
            texts = None if pairs is None else [text for text, _ in pairs]
            made.append(Encoded(inputs, label, 1, about=(offsets, context), expected=texts, shown=question))
        return made

    def labels(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        places = torch.tensor([one.label for one in examples])
        return {"start_positions": places[:, 0], "end_positions": places[:, 1]}

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        """The mean of the losses of begin and end, which are not smoothed; right where both are."""
        device = outputs.start_logits.device
        starts = torch.tensor([one.label[0] for one in examples], device=device)
        ends = torch.tensor([one.label[1] for one in examples], device=device)
        lengths = torch.tensor([len(one.input_ids) for one in examples], device=device)
        # padding is no answer: without this a row's loss would depend on the longest of its batch
        padding = torch.arange(outputs.start_logits.shape[1], device=device)[None] >= lengths[:, None]
        begin, _ = class_sums(outputs.start_logits.masked_fill(padding, -torch.inf), starts, 0.0)
        end, _ = class_sums(outputs.end_logits.masked_fill(padding, -torch.inf), ends, 0.0)
        right = (outputs.start_logits.argmax(-1) == starts) & (outputs.end_logits.argmax(-1) == ends)
        return (begin + end) / 2, right.sum()

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        """Of each window its best answer, its score, and the score of there being none."""
        found = []
        for at, one in enumerate(examples):
            offsets, context = one.about
            starts, ends = outputs.start_logits[at].float(), outputs.end_logits[at].float()
            inside = [place for place, span in enumerate(offsets) if span is not None]
            index = torch.tensor(inside)
            begin, finish = starts.cpu()[index], ends.cpu()[index]
            many = min(BEST, len(inside))
            best, text = float("-inf"), ""
            for first in begin.topk(many).indices.tolist():
                for last in finish.topk(many).indices.tolist():
                    score = float(begin[first] + finish[last])
                    if first <= last < first + LONGEST and score > best:
                        best, text = score, context[offsets[inside[first]][0] : offsets[inside[last]][1]]
            found.append((best, text, float(starts[0] + ends[0])))
        return found

    def combine(self, examples: Sequence[Encoded], decoded: Sequence[Any]) -> list[Any]:
        """The best answer over all windows of a row; "" where every window says more surely that there is none."""
        answers = []
        for windows in by_rows(examples, decoded):
            best, text, _ = max(windows)
            answers.append(text if best >= min(none for _, _, none in windows) else "")
        return answers

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        return metrics.squad(given, expected)

    def is_right(self, given: Any, expected: Any) -> bool:
        return metrics.squad([given], [expected])["exact_match"] == 1.0


def _span(offsets: Sequence[tuple[int, int] | None], pairs: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """The tokens of the first answer that stands wholly in a window; (0, 0) where none does."""
    inside = [(place, span) for place, span in enumerate(offsets) if span is not None]
    for text, start in pairs:
        end = start + len(text)
        if not text or not inside or inside[0][1][0] > start or inside[-1][1][1] < end:
            continue
        first = max(place for place, span in inside if span[0] <= start)
        last = min(place for place, span in inside if span[1] >= end)
        return first, last
    return 0, 0
