"""From logits to tokens: greedy for many rows at once, everything else row by row, as each request asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.serve.model import native
from lorakit.serve.request import Sampling


@dataclass
class Choice:
    """A chosen token, with what was asked to be reported of it."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class NoChoice:
    """Why a row gives no token; its request ends with this reason, and no other request does.

    Attributes:
        reason: in words, going on after the request's adapters have been named.
        finite: False where the model's numbers are not.
    """

    reason: str
    finite: bool = True


@dataclass
class Chooser:
    """How one request's tokens are chosen.

    Attributes:
        sampling: as asked.
        prompt: tokens of the prompt.
        ends: the token ids that end the answer.
        answer: tokens so far.
    """

    sampling: Sampling
    prompt: Sequence[int]
    ends: frozenset[int]
    answer: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.sampling
        self.plain = (
            s.temperature == 0
            and s.logprobs is None
            and not s.logit_bias
            and s.presence_penalty == s.frequency_penalty == 0
            and s.repetition_penalty == 1
            and not s.min_tokens
        )
        self._generator: torch.Generator | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        """This request's own random numbers, so that what else is in the batch changes none of them."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed % 2**63)
        return self._generator


LEAST_TEMPERATURE = 1e-6
"""Lower ones (but for 0) are this one: what is 1e-4 below the largest logit then has a probability of e^-100."""

LEAST_LOGPROB = -9999.0
"""What is reported of a token that cannot come: JSON has no infinity."""

_NOT_FINITE = NoChoice("gives numbers that are not finite", finite=False)


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice | NoChoice]:
    """One token for every row of `logits` (rows, vocabulary). What is wrong with a row is that row's alone."""
    if all(chooser.plain for chooser in choosers):
        return _greedy(logits)
    plain = [row for row, chooser in enumerate(choosers) if chooser.plain]
    greedy = dict(zip(plain, _greedy(logits[plain]), strict=True)) if plain else {}
    return [
        greedy[row] if row in greedy else _choose(logits[row].float(), chooser) for row, chooser in enumerate(choosers)
    ]


def _greedy(logits: Tensor) -> list[Choice | NoChoice]:
    tokens = _greatest(logits)
    finite = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    return [
        Choice(token) if sound else _NOT_FINITE for token, sound in zip(tokens.tolist(), finite.tolist(), strict=True)
    ]


def _greatest(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu" and logits.is_contiguous() and native.find("greatest", logits.dtype) is not None:
        return native.greatest(logits)  # torch's argmax of bfloat16 is a tenth of a step
    return logits.argmax(-1)


def _choose(logits: Tensor, chooser: Chooser) -> Choice | NoChoice:
    """One token from one row of logits (vocabulary,)."""
    s = chooser.sampling
    if not logits.max().isfinite():  # NaN is the largest of all
        return _NOT_FINITE
    logits = _penalised(logits, chooser)
    top = logits.max()
    if not top.isfinite():
        return NoChoice("has logits that are not finite any more under these penalties; ask for weaker ones")
    try:
        token = int(logits.argmax()) if s.temperature == 0 else _draw(logits - top, chooser)
    except RuntimeError as problem:  # one row's numbers must not end the step of all
        return NoChoice(f"has probabilities that cannot be drawn from ({problem})")
    if s.logprobs is None:
        return Choice(token)
    logprobs = logits.log_softmax(-1).clamp(min=LEAST_LOGPROB)
    values, ids = logprobs.topk(min(s.logprobs, logprobs.shape[0]))
    return Choice(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _penalised(logits: Tensor, chooser: Chooser) -> Tensor:
    s = chooser.sampling
    logits = logits.clone()
    if s.repetition_penalty != 1:
        met = torch.tensor(sorted({*chooser.prompt, *chooser.answer}), device=logits.device)
        own = logits[met]
        logits[met] = torch.where(own > 0, own / s.repetition_penalty, own * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and chooser.answer:
        ids, counts = torch.tensor(chooser.answer, device=logits.device).unique(return_counts=True)
        logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
    for token, number in s.logit_bias.items():
        if 0 <= token < logits.shape[0]:
            logits[token] += number
    if len(chooser.answer) < s.min_tokens:
        logits[sorted(end for end in chooser.ends if end < logits.shape[0])] = float("-inf")
    return logits


def _draw(logits: Tensor, chooser: Chooser) -> int:
    """A random token from what top-k, top-p and min-p leave of logits whose largest is 0."""
    s = chooser.sampling
    logits = logits / max(s.temperature, LEAST_TEMPERATURE)
    if s.top_k and s.top_k < logits.shape[0]:
        logits, ids = logits.topk(s.top_k)
    elif s.top_p < 1:
        logits, ids = logits.sort(descending=True)
    else:
        ids = None
    p = logits.softmax(-1)
    if s.top_p < 1:
        p = p * (p.cumsum(-1) - p < s.top_p)  # the token that crosses the line is in
    if s.min_p:
        p = p * (p >= s.min_p * p.max())
    drawn = int(torch.multinomial(p, 1, generator=chooser.generator(p.device)))
    return drawn if ids is None else int(ids[drawn])
