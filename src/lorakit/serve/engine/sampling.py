"""From logits to tokens: greedy for many rows at once, everything else row by row, as each request asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.serve.model import native
from lorakit.serve.request import Constraint, Sampling


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
        constraint: what the answer must keep to, or None.
    """

    sampling: Sampling
    prompt: Sequence[int]
    ends: frozenset[int]
    answer: list[int] = field(default_factory=list)
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        s = self.sampling
        self.plain = (
            s.temperature == 0
            and self.constraint is None
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

FAULTS = {
    -1: NoChoice("gives numbers that are not finite", finite=False),
    -3: NoChoice("may give no token that the grammar allows"),
    -2: NoChoice("has logits that are not finite any more under these penalties; ask for weaker ones"),
}
"""What stands for a token where there is none: why."""


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice | NoChoice]:
    """One token for every row of `logits` (rows, vocabulary). What is wrong with a row is that row's alone.

    All that is found comes from the device in one copy: reading a number waits for all that a GPU was asked before.
    """
    plain = [row for row, chooser in enumerate(choosers) if chooser.plain]
    own = logits if len(plain) == len(choosers) else logits[plain]
    found = {row: _choose(logits[row].float(), one) for row, one in enumerate(choosers) if not one.plain}
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # whole numbers stay whole in either
    numbers = torch.cat(
        [part.to(precise) for part in ([_greedy(own)] if plain else []) + list(found.values())]
    ).tolist()
    greedy, rest = dict(zip(plain, numbers, strict=False)), iter(numbers[len(plain) :])
    return [
        _told([greedy[row]] if row in greedy else [next(rest) for _ in range(len(found[row]))])
        for row in range(len(choosers))
    ]


def _told(numbers: list[float]) -> Choice | NoChoice:
    """A token, and where asked for its log probability, the likeliest tokens and theirs."""
    token, *others = numbers
    if token < 0:
        return FAULTS[int(token)]
    if not others:
        return Choice(int(token))
    most = len(others) // 2
    return Choice(int(token), others[0], tuple(zip(map(int, others[1 : 1 + most]), others[1 + most :], strict=True)))


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens (rows,)."""
    tokens = _greatest(logits)
    return tokens.where(logits.gather(1, tokens[:, None])[:, 0].isfinite(), -1)


def _greatest(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu" and logits.is_contiguous() and native.find("greatest", logits.dtype) is not None:
        return native.greatest(logits)  # torch's argmax of bfloat16 is a tenth of a step
    return logits.argmax(-1)


def _choose(logits: Tensor, chooser: Chooser) -> Tensor:
    """One token from one row of logits (vocabulary,), as `_told` reads it."""
    s = chooser.sampling
    sound = logits.max().isfinite()  # NaN is the largest of all
    logits = _penalised(logits, chooser)
    top = logits.max()
    kept = top.isfinite()
    token = logits.argmax() if s.temperature == 0 else _draw(logits - top, chooser)
    told = token.where(kept, -2 if chooser.constraint is None else -3).where(sound, -1)[None]
    if s.logprobs is None:
        return told
    logprobs = logits.log_softmax(-1).clamp(min=LEAST_LOGPROB)
    values, ids = logprobs.topk(min(s.logprobs, logprobs.shape[0]))
    return torch.cat([part.double() for part in (told, logprobs.gather(0, token[None]), ids, values)])


def _penalised(logits: Tensor, chooser: Chooser) -> Tensor:
    s = chooser.sampling
    logits = logits.clone()
    if s.repetition_penalty != 1:
        met = torch.tensor(sorted({*chooser.prompt, *chooser.answer}), device=logits.device)
        own = logits[met]
        logits[met] = torch.where(own > 0, own / s.repetition_penalty, own * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and chooser.answer:
        ids, counts = (one.to(logits.device) for one in torch.tensor(chooser.answer).unique(return_counts=True))
        logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
    for token, number in s.logit_bias.items():
        if 0 <= token < logits.shape[0]:
            logits[token] += number
    if len(chooser.answer) < s.min_tokens:
        logits[sorted(end for end in chooser.ends if end < logits.shape[0])] = float("-inf")
    if chooser.constraint is not None:
        allowed = torch.from_numpy(chooser.constraint.allowed(logits.shape[0], chooser.ends))
        logits.masked_fill_(~allowed.to(logits.device), float("-inf"))
    return logits


def _draw(logits: Tensor, chooser: Chooser) -> Tensor:
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
    # What torch.multinomial does for one draw, without its checks, each of which waits for the device.
    drawn = (p / torch.empty_like(p).exponential_(generator=chooser.generator(p.device))).argmax()
    return drawn if ids is None else ids.gather(0, drawn[None])[0]  # ids[drawn] would read drawn
