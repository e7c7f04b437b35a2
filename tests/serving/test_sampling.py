"""Each option of `Sampling` does what it says, and a seed gives the same draws whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import torch

from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.sampling import Chooser, choose
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.request import Request, Sampling
from serving.small import greedy, model, prompt

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def draws(
    count: int = 300, answer: list[int] | None = None, ends: frozenset[int] = frozenset(), **options: Any
) -> set[int]:
    chooser = Chooser(Sampling(seed=1, **options), [0], ends, answer or [])
    return {choose(LOGITS[None], [chooser])[0].token for _ in range(count)}


def test_what_is_left_to_draw_from() -> None:
    assert draws(temperature=0) == {1}
    assert draws(temperature=1.0) == {0, 1, 2, 3, 4}
    assert draws(top_k=2) == {1, 2}
    assert draws(top_p=0.5) == {1}  # p is .64, .24, .09, ...
    assert draws(top_p=0.7) == {1, 2}
    assert draws(min_p=0.2) == {1, 2}
    assert draws(top_k=3, top_p=0.8) == {1, 2}


def test_penalties_and_biases() -> None:
    assert draws(1, temperature=0, presence_penalty=1.5, answer=[1]) == {2}
    assert draws(1, temperature=0, frequency_penalty=0.4, answer=[1]) == {1}
    assert draws(1, temperature=0, frequency_penalty=0.4, answer=[1, 1, 1]) == {2}
    assert draws(1, temperature=0, repetition_penalty=2.0, answer=[1]) == {2}
    assert draws(1, temperature=0, logit_bias={4: 9.0}) == {4}
    assert draws(1, temperature=0, min_tokens=1, ends=frozenset({1})) == {2}
    assert draws(1, temperature=0, min_tokens=1, ends=frozenset({1}), answer=[0]) == {1}


def test_log_probabilities() -> None:
    chosen = choose(LOGITS[None], [Chooser(Sampling(temperature=0, logprobs=2), [0], frozenset())])[0]
    expected = LOGITS.log_softmax(-1)
    assert chosen.logprob == float(expected[1])
    assert chosen.top == ((1, float(expected[1])), (2, float(expected[2])))
    assert choose(LOGITS[None], [Chooser(Sampling(temperature=0, logprobs=0), [0], frozenset())])[0].top == ()


def test_a_seed_repeats_whatever_the_batch() -> None:
    engine = LocalEngine(model(), None, Limits(batch=8, cache_bytes=2**20))
    engine.start()
    sampling = Sampling(max_tokens=10, temperature=1.5, seed=11, ignore_eos=True)
    alone = engine.submit(Request("alone", tuple(prompt(1, 8)), sampling=sampling)).tokens(60)
    others = [engine.submit(greedy(n, prompt(n, 5 + n), {}, 12)) for n in range(4)]
    again = engine.submit(Request("again", tuple(prompt(1, 8)), sampling=sampling)).tokens(60)
    other = Sampling(max_tokens=10, temperature=1.5, seed=12, ignore_eos=True)
    assert again == alone
    assert engine.submit(Request("other", tuple(prompt(1, 8)), sampling=other)).tokens(60) != alone
    for ticket in others:
        ticket.result(60)
    engine.stop()
