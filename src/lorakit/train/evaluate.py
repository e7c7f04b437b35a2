"""How good is the model: loss and perplexity, and answers that are right or wrong, before and after.

Three measurements, each a plain function over token ids, each without gradient:

- `evaluate_loss`: the mean loss per labelled token, its perplexity, and how often the likeliest token was the
right one. The mean is over all labelled tokens, not over batches, so it does not depend on the batch size.
- `score_choices` (scoring.py): the log-probability of each of a few given answers. An answer of several tokens
counts with the sum of its tokens' log-probabilities.
- `generate_answers`: the model's own greedy answers, batched with padding on the left.

"Before" is the same model under `lorakit.use(model, None)`, so nothing is loaded twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError, plural
from lorakit.files.prompt import end_ids
from lorakit.models.evaluating import evaluating
from lorakit.train.data.blocks import documents
from lorakit.train.data.store import lengths_of
from lorakit.train.data.templates import shared_prefix_length
from lorakit.train.scoring import score_choices
from lorakit.train.step.loss import LossStats, padded_loss
from lorakit.train.step.packing import mask_of, pad_rows

if TYPE_CHECKING:
    from rich.table import Table

    from lorakit.train.config.options import EvaluateOptions
    from lorakit.train.data.examples import Question
    from lorakit.train.data.store import Example


@dataclass(frozen=True)
class Answer:
    """One held-out row asked: what was asked (without what all prompts share), expected, given, and if right."""

    prompt: str
    expected: str
    given: str
    right: bool


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one set of rows. What was not asked for is None.

    `loss` in nats per labelled token; `accuracy`, `exact_match` and `token_accuracy` are shares between 0 and 1. `metrics` are
    the task's own, by name.
    """

    rows: int
    loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None
    accuracy: float | None = None
    exact_match: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    answers: tuple[Answer, ...] = field(default=(), repr=False)

    def numbers(self) -> dict[str, float]:
        """The measured numbers by name, for a table, a model card or a line of JSON."""
        names = ("loss", "perplexity", "token_accuracy", "accuracy", "exact_match")
        return {name: value for name in names if (value := getattr(self, name)) is not None} | dict(self.metrics)


@dataclass(frozen=True)
class EvaluationSet:
    """What a model is measured on: examples for the loss (of a classifier, labelled texts), and for the answers questions
    and the token ids of `evaluate.choices` (see `lorakit.train.data.examples.choice_ids`). `stops` end an answer besides the
    model's own end tokens."""

    examples: Sequence[Example]
    questions: Sequence[Question] = ()
    choices: Sequence[Sequence[int]] = ()
    stops: Sequence[int] = ()


# -- the loss --------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    loss_of: Callable[..., tuple[Tensor, LossStats]] = padded_loss,
) -> LossStats:
    """Loss, perplexity and token accuracy over `examples`, in batches of similar length.

    `loss_of` computes one batch, as a `LossPath` does. Raises LorakitError when no example has a label.
    """
    lengths = lengths_of(examples)
    by_length = sorted(range(len(examples)), key=lengths.__getitem__)
    total = LossStats()
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            batch = documents(examples[at] for at in by_length[start : start + batch_size])
            total += loss_of(model, batch)[1]
    if total.targets == 0:
        raise LorakitError(
            f"evaluate: of {plural(len(examples), 'row')} none of them has a labelled token; check that the rows have a "
            "completion and that truncation keeps it"
        )
    return total


# -- own answers -----------------------------------------------------------------------------------


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    stops: Sequence[int] = (),
) -> list[str]:
    """The model's greedy answer to every prompt (token ids), as text without special tokens. It ends at `stops` too.

    Batches hold prompts of similar length, padded on the left so that every answer begins in the same column.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    stops = list(dict.fromkeys([*end_ids(tokenizer, model), *stops]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            asked = [prompts[i] for i in rows]
            ids, mask = pad_rows(asked, left=True), mask_of(asked, left=True)
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
            )
            for index, row in zip(rows, written[:, ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in stops), len(row))
                answers[index] = str(tokenizer.decode(row[:end], skip_special_tokens=True))
    return answers


def match_choice(text: str, choices: Sequence[str]) -> str | None:
    """Which of `choices` a free answer names first, as whole words and in any case; None if it names none."""
    found = []
    for choice in choices:
        if match := re.search(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, flags=re.IGNORECASE):
            # Of two that begin at the same place, the longer is meant: "very good" before "very".
            found.append((match.start(), -len(choice), choice))
    return min(found)[2] if found else None


# -- all together ----------------------------------------------------------------------------------


def measure(
    model: Any,
    tokenizer: Any,
    held: EvaluationSet,
    options: EvaluateOptions,
    *,
    batch_size: int = 32,
    loss_of: Callable[..., tuple[Tensor, LossStats]] = padded_loss,
) -> Evaluation:
    """Everything that `options` asks for, on the route that is in use.

    Raises LorakitError when a row to be scored expects an answer that is none of the choices.
    """
    start = time.perf_counter()
    sums = evaluate_loss(model, held.examples, batch_size=batch_size, loss_of=loss_of)
    answers: list[Answer] = []
    accuracy = exact = None
    if options.answers != "none" and held.questions:
        asked = held.questions[: options.limit]
        if options.answers == "score":
            answers = _scored_answers(model, asked, options, held.choices, batch_size)
            accuracy = fmean(answer.right for answer in answers)
        else:
            answers, named = _generated_answers(model, tokenizer, asked, options, batch_size, held.stops)
            exact = fmean(answer.right for answer in answers)
            accuracy = fmean(named) if named else None
    return Evaluation(
        rows=len(held.examples),
        loss=sums.mean,
        perplexity=sums.perplexity,
        token_accuracy=sums.token_accuracy,
        accuracy=accuracy,
        exact_match=exact,
        seconds=time.perf_counter() - start,
        answers=tuple(answers),
    )


def _scored_answers(
    model: Any,
    questions: Sequence[Question],
    options: EvaluateOptions,
    choices: Sequence[Sequence[int]],
    batch_size: int,
) -> list[Answer]:
    known = {normalise(choice, options.ignore_case) for choice in options.choices}
    for question in questions:
        if normalise(question.answer, options.ignore_case) not in known:
            raise LorakitError(
                f"evaluate: {question.where} expects {question.answer!r}, which is none of evaluate.choices "
                f"({', '.join(options.choices)}); add it, or use evaluate.answers: generate"
            )
    scores = score_choices(model, [question.prompt_ids for question in questions], choices, batch_size=batch_size)
    given = [options.choices[i] for i in scores.argmax(-1).tolist()]
    return _answers(questions, given, options)


def _generated_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    options: EvaluateOptions,
    batch_size: int,
    stops: Sequence[int],
) -> tuple[list[Answer], list[bool]]:
    """The answers, and with choices: whether the choice that each answer names first is the one expected."""
    asked = [question.prompt_ids for question in questions]
    limits = {"max_new_tokens": options.max_new_tokens, "batch_size": batch_size}
    given = generate_answers(model, tokenizer, asked, stops=stops, **limits)
    named = []
    if options.choices:
        for question, text in zip(questions, given, strict=True):
            choice = match_choice(text, options.choices)
            named.append(choice is not None and normalise(choice) == normalise(question.answer))
    return _answers(questions, given, options), named


def _answers(questions: Sequence[Question], given: Sequence[str], options: EvaluateOptions) -> list[Answer]:
    shown = strip_shared([question.prompt for question in questions])
    answers = []
    for prompt, question, text in zip(shown, questions, given, strict=True):
        right = normalise(text, options.ignore_case) == normalise(question.answer, options.ignore_case)
        answers.append(Answer(prompt, question.answer, text.strip(), right))
    return answers


def normalise(text: str, ignore_case: bool = True) -> str:
    """An answer as it is compared: white space around and between words does not count, nor case if so asked."""
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text


def strip_shared(texts: Sequence[str]) -> list[str]:
    """Texts without the words that all of them begin and end with: of prompts, what is asked in each."""
    if len(set(texts)) < 2:
        return list(texts)
    split = [re.findall(r"\s+|\S+", text) for text in texts]
    start = shared_prefix_length(split)
    end = shared_prefix_length([words[start:][::-1] for words in split])
    return ["".join(words[start : len(words) - end]).strip() for words in split]


def compared(evaluations: Iterable[Evaluation]) -> list[list[str]]:
    """A row per measured number: its name, and what each evaluation has of it; empty where it has none."""
    numbers = [evaluation.numbers() for evaluation in evaluations]
    names = dict.fromkeys(name for one in numbers for name in one)
    return [[_spaced(name), *(written(name, one[name]) if name in one else "" for one in numbers)] for name in names]


def in_words(numbers: Mapping[str, float]) -> str:
    """Measured numbers in one line."""
    return ", ".join(f"{_spaced(name)} {written(name, value)}" for name, value in numbers.items())


def tabulate(evaluations: dict[str, Evaluation], title: str = "Evaluation") -> Table:
    """A Rich table: one row per measured number, one column per evaluation (such as "before", "after")."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right")
    for row in compared(evaluations.values()):
        table.add_row(*row)
    table.add_row("rows", *(f"{evaluation.rows:,}" for evaluation in evaluations.values()))
    return table


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def written(name: str, value: float) -> str:
    """A measured number as a person reads it: shares in percent, losses with four digits."""
    if name.endswith(("accuracy", "exact_match", "f1", "precision", "recall")):
        return f"{100 * value:.1f}%"
    return f"{value:,.2f}" if name == "perplexity" else f"{value:.4f}"
