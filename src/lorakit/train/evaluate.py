"""How good is the model: loss and perplexity, and answers that are right or wrong, before and after.

Three measurements, each a plain function over token ids, each without gradient:

- `evaluate_loss`: the mean loss per labelled token, its perplexity, and how often the likeliest token was the
right one. The mean is over all labelled tokens, not over batches, so it does not depend on the batch size.
- `score_choices`: the log-probability of each of a few given answers (a classification asked in words). An
answer of several tokens counts with the sum of its tokens' log-probabilities.
- `generate_answers`: the model's own greedy answers, batched with padding on the left.

Scoring is where a naive loop wastes most: every choice drags its whole prompt along, and every prompt the
same instruction. `score_choices` computes what all prompts begin with once, lays the choices side by side
behind their prompt with an attention mask that keeps them from seeing each other, and asks for logits only
where an answer begins or goes on. A model that cannot be run so (no position ids, a window shorter than the
text) is scored row by row, which is slower and the same; the first prompts are scored both ways to be sure.

"Before" is the same model under `lorakit.use(model, None)`, so nothing is loaded twice.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.board import whole_rows
from lorakit.errors import LorakitError
from lorakit.train.loss import prompts_known

if TYPE_CHECKING:
    from rich.table import Table

    from lorakit.train.data import Example, Question
    from lorakit.train.options import EvaluateOptions

log = logging.getLogger("lorakit.train")


@dataclass(frozen=True)
class LossSums:
    """Sums over labelled tokens, so that batches and processes simply add: `loss` is the summed negative
    log-likelihood in nats, `correct` how many likeliest tokens were the label, `tokens` how many labels."""

    loss: float = 0.0
    correct: float = 0.0
    tokens: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.loss + other.loss, self.correct + other.correct, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Mean loss per labelled token."""
        return self.loss / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """e to the mean loss: infinite rather than an overflow for a hopeless model."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of labelled tokens that were the likeliest."""
        return self.correct / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class Answer:
    """One held-out row asked: what was asked (without what all prompts share), expected, given, and if
    right."""

    prompt: str
    expected: str
    given: str
    right: bool


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one set of rows. What was not asked for is None.

    `loss` in nats per labelled token; `accuracy`, `exact_match` and `token_accuracy` are shares between 0 and
    1.
    """

    rows: int
    loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None
    accuracy: float | None = None
    exact_match: float | None = None
    seconds: float = 0.0
    answers: tuple[Answer, ...] = field(default=(), repr=False)

    def numbers(self) -> dict[str, float]:
        """The measured numbers by name, for a table, a model card or a line of JSON."""
        names = ("loss", "perplexity", "token_accuracy", "accuracy", "exact_match")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


# -- the loss --------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    loss_of: Callable[[nn.Module, Sequence[Example]], LossSums] | None = None,
) -> LossSums:
    """Loss, perplexity and token accuracy over `examples`, in batches of similar length.

    `loss_of` computes one batch; by default the padded path. Raises LorakitError when no example has a label.
    """
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    total = LossSums()
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            total += (loss_of or _padded_sums)(model, batch)
    if total.tokens == 0:
        raise LorakitError(
            f"evaluate: asked for the loss of {len(examples)} rows; none of them has a labelled token; "
            "check that the rows hold a completion and that truncation leaves it in"
        )
    return total


def _padded_sums(model: nn.Module, examples: Sequence[Example]) -> LossSums:
    from lorakit.train.loss import padded_loss

    _, stats = padded_loss(model, examples)
    return LossSums(float(stats.total), float(stats.right), stats.targets)


# -- given answers ---------------------------------------------------------------------------------


@torch.no_grad()
def score_choices(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    share: bool = True,
) -> Tensor:
    """Log-probability of every choice after every prompt: float32, [prompts, choices], on the CPU.

    `prompts` and `choices` are token ids; a choice of several tokens has the sum of their log-probabilities.
    Prompts are computed in order of length and what they all begin with once; `share=False` computes each
    pair on its own. Raises LorakitError for an empty prompt or choice, which has no probability.
    """
    for what, given in (("prompt", prompts), ("choice", choices)):
        for index, ids in enumerate(given):
            if len(ids) == 0:
                raise LorakitError(f"score: {what} {index} has no tokens, so nothing can be scored")
    if not prompts or not choices:
        return torch.zeros(len(prompts), len(choices))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    scores = torch.empty(len(prompts), len(choices))
    with evaluating(model):
        reader = Reader(model)
        together = share and _shares_exactly(reader, [prompts[i] for i in order], choices)
        shared = _common_prefix(prompts) if together else 0
        past = reader.read_prefix(prompts[0][:shared]) if shared else None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            asked = [prompts[i] for i in rows]
            if together:
                scores[rows] = _score_side_by_side(reader, asked, choices, shared, past)
            else:
                scores[rows] = _score_pairs(reader, asked, choices)
    return scores


class Reader:
    """A causal model asked for logits in a few places only, and those in float32.

    In bf16 a logit of 20 is known to 0.06, which turns close calls between answers into coin tosses; the head is a
    small part of the work when only the answers' places are asked for, so it is done in float32 there. A model
    without a plain linear head gives its own logits.
    """

    def __init__(self, model: Any) -> None:
        from lorakit.train.loss import Head, decoder_of, read_head

        self.model = model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.body: Any = None
        try:
            head: Head | None = read_head(model)
            self.body = decoder_of(model) if head is not None and head.is_linear else None
        except LorakitError:
            head = None
        self.head = head
        if self.body is not None and head is not None:
            wide = torch.promote_types(self.dtype, torch.float32)
            linear: Any = head.module
            self.weight: Tensor = linear.weight.detach().to(wide)
            self.bias: Tensor | None = linear.bias.detach().to(wide) if linear.bias is not None else None
        self.arguments = frozenset(inspect.signature((self.body or model).forward).parameters)

    def logits(self, rows: Tensor, places: Tensor, **inputs: Any) -> Tensor:
        """Logits [rows, places, vocabulary] at `places` [rows, places] of the model's output on `inputs`."""
        if self.body is None or self.head is None:
            logits: Tensor = self.model(**inputs).logits[rows, places]
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        hidden = self.body(**inputs).last_hidden_state[rows, places]
        return self.head.shape(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def read_prefix(self, ids: Sequence[int]) -> Any:
        """The keys and values of a prefix, computed once, to be repeated for every row that begins with it."""
        ids_of_one = torch.tensor([list(ids)], device=self.device)
        return (self.body or self.model)(input_ids=ids_of_one, use_cache=True).past_key_values


def _score_pairs(reader: Reader, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]) -> Tensor:
    """Every prompt with every choice as a row of its own, padded on the right: the plain way, and the reference."""
    device = reader.device
    columns = []
    for choice in choices:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max()) + len(choice)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) + len(choice)] = torch.tensor([*prompt, *choice])
            mask[row, : len(prompt) + len(choice)] = 1
        places = (lengths[:, None] - 1 + torch.arange(len(choice))).to(device)
        rows = torch.arange(len(prompts), device=device)[:, None]
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        answer = torch.tensor(choice, device=device).expand(len(prompts), -1)
        with prompts_known(reader.model, lengths.tolist()):
            logits = reader.logits(rows, places, **inputs)
        columns.append(_log_probabilities(logits, answer).sum(-1).cpu())
    return torch.stack(columns, dim=1).float()


def _score_side_by_side(
    reader: Reader, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], shared: int, past: Any
) -> Tensor:
    """All choices behind their prompt in one row, blind to each other; the prompts' first `shared` tokens are `past`.

    The prompts end in one column, so the places wanted (the prompt's last token and the choices) are the last columns
    of every row.
    """
    device, dtype = reader.device, reader.dtype
    tails = [list(prompt[shared:]) for prompt in prompts]
    tail = max(len(ids) for ids in tails)
    width = tail + sum(len(choice) for choice in choices)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    positions = torch.zeros(len(prompts), width, dtype=torch.long)
    sees = torch.zeros(len(prompts), width, shared + width, dtype=torch.bool)
    sees[:, :, :shared] = True
    for row, own in enumerate(tails):
        first = tail - len(own)
        ids[row, first:tail] = torch.tensor(own)
        positions[row, first:tail] = shared + torch.arange(len(own))
        sees[row, first:, shared + first : shared + tail] = True
        start = tail
        for choice in choices:
            end = start + len(choice)
            ids[row, start:end] = torch.tensor(choice)
            positions[row, start:end] = shared + len(own) + torch.arange(len(choice))
            sees[row, start:end, shared + start : shared + end] = True
            start = end
    # Left to right within what may be seen; a padding token sees itself, so that no row of the softmax is empty.
    sees &= torch.ones(width, shared + width, dtype=torch.bool).tril(diagonal=shared)
    sees[:, torch.arange(width), shared + torch.arange(width)] = True
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    if past is not None:
        past = copy.deepcopy(past)
        past.batch_repeat_interleave(len(prompts))
    rows = torch.arange(len(prompts), device=device)[:, None]
    places = torch.arange(tail - 1, width, device=device)[None]
    logits = reader.logits(
        rows,
        places,
        input_ids=ids.to(device),
        attention_mask=mask[:, None].to(device),
        position_ids=positions.to(device),
        past_key_values=past,
        use_cache=past is not None,
    )
    scores, start = [], 1
    for choice in choices:
        # The prompt's last token predicts the first of every choice, then each token of the choice the next.
        before = [0, *range(start, start + len(choice) - 1)]
        answer = torch.tensor(choice, device=device).expand(len(prompts), -1)
        scores.append(_log_probabilities(logits[:, before], answer).sum(-1).cpu())
        start += len(choice)
    return torch.stack(scores, dim=1).float()


def _log_probabilities(logits: Tensor, answer: Tensor) -> Tensor:
    """Log-probability of `answer` [rows, tokens] under `logits` [rows, tokens, vocabulary]."""
    return logits.gather(-1, answer[..., None])[..., 0] - logits.logsumexp(-1)


def _shares_exactly(reader: Reader, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]) -> bool:
    """Whether scoring side by side is right for this model: by what it accepts, by its window, and by trying it."""
    model = reader.model
    if not {"position_ids", "past_key_values", "attention_mask"} <= reader.arguments:
        log.info("scoring row by row: %s takes no position ids or no cache", type(model).__name__)
        return False
    whole = whole_rows(model)
    if whole is not None:
        log.info("scoring row by row: router %r weighs whole rows", whole)
        return False
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    longest = max(map(len, prompts)) + max(map(len, choices))
    if isinstance(window, int) and window < longest:
        log.info("scoring row by row: the model's attention window (%d) is shorter than the rows (%d)", window, longest)
        return False
    trial = [prompts[0], prompts[-1]]
    shared = _common_prefix(trial)
    past = reader.read_prefix(trial[0][:shared]) if shared else None
    plain = _score_pairs(reader, trial, choices)
    together = _score_side_by_side(reader, trial, choices, shared, past)
    # The two ways add the same numbers in another order. Rounding moves a score by a few units of the dtype's
    # precision for each layer; a model that mixes choices up is off by whole nats.
    bound = 1e-3 if torch.finfo(reader.dtype).eps < 1e-6 else 0.25
    agree = bool(((plain - together).abs() <= bound * (1 + plain.abs())).all())
    if not agree:
        log.info("scoring row by row: %s does not keep choices side by side apart", type(model).__name__)
    return agree


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own: its last predicts the
    answer."""
    if len(prompts) < 2:
        return 0
    first, last = min(list(prompt[:-1]) for prompt in prompts), max(list(prompt[:-1]) for prompt in prompts)
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))


# -- own answers -----------------------------------------------------------------------------------


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[str]:
    """The model's greedy answer to every prompt (token ids), as text without special tokens.

    Batches hold prompts of similar length, padded on the left so that every answer begins in the same column.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    stops = _stop_tokens(model, tokenizer)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(rows):
                ids[row, longest - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
                mask[row, longest - len(prompts[index]) :] = 1
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
            for index, row in zip(rows, written[:, longest:].tolist(), strict=True):
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


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation settings."""
    known: list[int] = []
    for source in (tokenizer, getattr(model, "generation_config", None)):
        token = getattr(source, "eos_token_id", None)
        known += token if isinstance(token, list) else [token] if token is not None else []
    return list(dict.fromkeys(known))


# -- all together ----------------------------------------------------------------------------------


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    questions: Sequence[Question] = (),
    *,
    options: EvaluateOptions | None = None,
    choices: Sequence[Sequence[int]] = (),
    batch_size: int = 32,
    loss_of: Callable[[nn.Module, Sequence[Example]], LossSums] | None = None,
) -> Evaluation:
    """Everything that `options` asks for, on the route that is in use.

    `choices` are the token ids of `options.choices` (see `lorakit.train.data.choice_ids`), for scored
    answers. Raises LorakitError when a row to be scored expects an answer that is none of the choices.
    """
    start = time.perf_counter()
    sums = evaluate_loss(model, examples, batch_size=batch_size, loss_of=loss_of)
    answers: list[Answer] = []
    accuracy = exact = None
    if options is not None and options.answers != "none" and questions:
        asked = list(questions)[: options.limit]
        if options.answers == "score":
            answers = _scored_answers(model, asked, options, choices, batch_size)
            accuracy = _share(answer.right for answer in answers)
        else:
            answers, named = _generated_answers(model, tokenizer, asked, options, batch_size)
            exact = _share(answer.right for answer in answers)
            accuracy = _share(named) if named else None
    return Evaluation(
        rows=len(examples),
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
    model: Any, tokenizer: Any, questions: Sequence[Question], options: EvaluateOptions, batch_size: int
) -> tuple[list[Answer], list[bool]]:
    """The answers, and with choices: whether the choice that each answer names first is the one expected."""
    given = generate_answers(
        model,
        tokenizer,
        [question.prompt_ids for question in questions],
        max_new_tokens=options.max_new_tokens,
        batch_size=batch_size,
    )
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
    """An answer as it is compared: white space around and between words does not count, nor case if so
    asked."""
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text


def strip_shared(texts: Sequence[str]) -> list[str]:
    """Texts without the beginning and the end that all of them share: of prompts, what is asked in each."""
    if len(set(texts)) < 2:
        return list(texts)
    shortest = min(map(len, texts))
    start = next((i for i in range(shortest) if len({text[i] for text in texts}) > 1), shortest)
    left = shortest - start
    end = next((i for i in range(left) if len({text[-1 - i] for text in texts}) > 1), left)
    return [text[start : len(text) - end].strip() for text in texts]


def _share(right: Iterable[bool]) -> float:
    known = list(right)
    return sum(known) / len(known)


def compare(model: nn.Module, adapter: str, measure: Callable[[], Evaluation]) -> tuple[Evaluation, Evaluation]:
    """`measure()` with the base model, then with `adapter`: (before, after). The route in use is restored."""
    import lorakit

    with lorakit.use(model, None):
        before = measure()
    with lorakit.use(model, adapter):
        after = measure()
    return before, after


def tabulate(evaluations: dict[str, Evaluation], title: str = "Evaluation") -> Table:
    """A Rich table: one row per measured number, one column per evaluation (such as "before", "after")."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right")
    measured = list(dict.fromkeys(key for evaluation in evaluations.values() for key in evaluation.numbers()))
    for key in measured:
        cells = [evaluation.numbers().get(key) for evaluation in evaluations.values()]
        table.add_row(key.replace("_", " "), *("" if cell is None else written(key, cell) for cell in cells))
    table.add_row("rows", *(f"{evaluation.rows:,}" for evaluation in evaluations.values()))
    return table


def written(name: str, value: float) -> str:
    """A measured number as a person reads it: shares in percent, losses with four digits."""
    if name in ("accuracy", "exact_match", "token_accuracy"):
        return f"{100 * value:.1f}%"
    return f"{value:.4f}" if name == "loss" else f"{value:,.2f}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradients; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
