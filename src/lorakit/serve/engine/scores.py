"""Log probabilities of prompts: what the model gives each token of a prompt after those before it.

Every position's logits are needed, so pages of the prefix cache, which hold keys and values alone, do not help: what is asked
for is computed again. (vocabulary,) numbers a token add up; a step therefore holds logits of prompts up to `ROOM` bytes, and of
these a few rows at a time are made into probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.serve.engine.sampling import FAULTS, LEAST_LOGPROB, NoChoice
from lorakit.serve.request import PromptToken

ROOM = 64 * 2**20
"""Bytes of logits of prompts (as float32) in one step."""

PIECE = 4 * 2**20
"""Bytes of logits that are made into probabilities at once."""


def rows_of(vocabulary: int) -> int:
    """Tokens of prompts whose logits one step holds at most."""
    return max(1, ROOM // (4 * vocabulary))


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[PromptToken] | NoChoice:
    """What these tokens have under the logits (tokens, vocabulary) that stand before each of them.

    Args:
        logits: as the model gives them: before temperature, penalties and every bias.
        tokens: the token that follows each row.
        top: how many of the most probable tokens to report with each.
    """
    found: list[PromptToken] = []
    size = max(1, PIECE // (4 * logits.shape[1]))
    for first in range(0, len(tokens), size):
        ids = torch.tensor(tokens[first : first + size], device=logits.device)
        rows = logits[first : first + size].float()
        total = rows.logsumexp(-1, keepdim=True)
        if not total.isfinite().all():
            return FAULTS[-1]
        own = rows.gather(1, ids[:, None])
        ranks = (rows > own).sum(1) + 1
        # one subtraction for both: the greatest of the top is the token's own number where the token is the most probable
        logprobs = (own - total).clamp(min=LEAST_LOGPROB)[:, 0]
        values, places = rows.topk(min(top, rows.shape[1]))
        values = (values - total).clamp(min=LEAST_LOGPROB)
        found += [
            PromptToken(token, logprob, rank, tuple(zip(*most, strict=True)))
            for token, logprob, rank, *most in zip(
                *(part.tolist() for part in (ids, logprobs, ranks, places, values)), strict=True
            )
        ]
    return found
