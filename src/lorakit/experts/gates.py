"""The arithmetic of gates: which experts a token keeps, and what keeps all experts in use.

Every function takes and gives float32 or better; an axis of experts is always the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_mask(scores: Tensor, k: int | None) -> Tensor:
    """True for the k largest of the last axis, (…, experts); all of them for None. Of equal scores the first expert's wins,
    so that the choice is the same everywhere."""
    experts = scores.shape[-1]
    if k is None or k >= experts:
        return torch.ones_like(scores, dtype=torch.bool)
    kept = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)


def softmax_over(scores: Tensor, kept: Tensor) -> Tensor:
    """The softmax of the kept scores, zero elsewhere; all zero where none is kept."""
    weights = scores.masked_fill(~kept, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(~kept.any(dim=-1, keepdim=True), 0.0)


def balance(probabilities: Tensor, kept: Tensor, counts: Tensor | None = None) -> Tensor:
    """The load-balance loss of the Switch Transformer for one router: `E · Σ_e f_e P_e`.

    f_e is the share of routing decisions that went to expert e, P_e its mean probability. It is 1 where both are uniform
    and E where one expert gets everything. Only P carries a gradient. Fedus et al. 2021, arXiv 2101.03961, equations 4 to
    6; with k kept experts the decisions are k per token, so that the loss does not grow with k.

    Args:
        probabilities: (…, experts), the softmax over all experts.
        kept: (…, experts), true for the experts that a token uses.
        counts: (…), how often each token counts (0 for padding); 1 by default.
    """
    experts = probabilities.shape[-1]
    P = probabilities.reshape(-1, experts)
    chosen = kept.reshape(-1, experts).to(P.dtype)
    f = _mean(chosen, counts) / _mean(chosen.sum(-1), counts).clamp_min(torch.finfo(P.dtype).tiny)
    return experts * (f * _mean(P, counts)).sum()


def z_loss(logits: Tensor, counts: Tensor | None = None) -> Tensor:
    """The router z-loss: the mean of `(log Σ_e exp z_e)²`, which keeps logits small. Zoph et al. 2022, arXiv 2202.08906,
    equation 5. Arguments as in `balance`."""
    return _mean(logits.logsumexp(dim=-1).square().reshape(-1), counts)


def share_loss(weights: Tensor, counts: Tensor | None = None) -> Tensor:
    """MoLE's balance loss for one gate: `-Σ_e log q_e`, q_e the mean weight of expert e over all tokens.

    It is `E log E` where the shares are uniform, its least value. Wu et al. 2024, arXiv 2404.13628, section 3.3, whose
    mean is over the gates of all blocks; here each gate is balanced by itself.
    """
    q = _mean(weights.reshape(-1, weights.shape[-1]), counts)
    return -q.clamp_min(torch.finfo(q.dtype).tiny).log().sum()


def _mean(values: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of values (tokens, …) over tokens, each counted so often; zero where none counts."""
    c = values.new_ones(len(values)) if counts is None else counts.reshape(-1).to(values.dtype)
    return (c @ values) / c.sum().clamp_min(torch.finfo(values.dtype).tiny)
