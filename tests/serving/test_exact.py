"""Whatever else is in the batch, a request gets, token for token in float32, what it gets alone from `generate`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.models.loading import load_model
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.request import Ticket
from serving.small import Oracle, greedy, model, prompt, write_adapter

METHODS: dict[str, Any] = {
    "r2": lk.LoRA(rank=2),
    "r8": lk.LoRA(rank=8, alpha=16),
    "r16": lk.LoRA(rank=16),
    "dora": lk.DoRA(inner=lk.LoRA(rank=3)),
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "gpt2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Oracle]:
    base = model(request.param)
    store = tmp_path_factory.mktemp(request.param)
    for seed, (name, method) in enumerate(METHODS.items()):
        write_adapter(base, store / name, method, seed=seed)
    return base, store, Oracle(base, store)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_any_mixture_is_as_each_alone(served: tuple[Any, Path, Oracle], compiled: bool) -> None:
    """Random arrival, length, rank, adapter, blend, cancellation, deadline; prompts that share beginnings; too few pages for
    all, so that requests are sent back and begin again."""
    base, store, oracle = served
    engine = LocalEngine(
        base, store, Limits(batch=5, step_tokens=24, cache_bytes=22 * 2**13, overtake=64), compiled=compiled
    )
    engine.pool.start()
    draw = random.Random(7 + compiled)
    blends: list[dict[str, float]] = [
        {},
        {"r2": 1.0},
        {"r8": 1.0},
        {"r16": 1.0},
        {"dora": 1.0},
        {"r8": 0.4, "dora": 0.7},
    ]
    beginning = prompt(99, 40)
    waiting = [
        greedy(n, beginning[: draw.choice([0, 20, 40])] + prompt(n, draw.randint(1, 30)), draw.choice(blends), 9)
        for n in range(16)
    ]
    tickets: list[Ticket] = []
    left: set[str] = set()
    while waiting or not all(ticket.ended for ticket in tickets):
        for _ in range(draw.choice([0, 0, 1, 2])):
            if waiting:
                tickets.append(engine.submit(waiting.pop()))
        if draw.random() < 0.05:
            gone = draw.choice(tickets) if tickets else None
            if gone is not None and not gone.ended:
                gone.cancel()
                left.add(gone.request.id)
        engine.step()
    for ticket in tickets:
        expected = oracle.answer(ticket.request.prompt, ticket.request.blend, 9)
        found = ticket.tokens()
        if ticket.request.id in left:
            assert found == expected[: len(found)]
        else:
            assert found == expected, ticket.request
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.cache_bytes == 0
    assert not any(info.using for info in engine.adapters.all())
    assert stats.cached_tokens > 0
    assert sum(stats.finished.values()) == 16
    engine.stop()


def test_prefixes_are_shared_only_under_the_same_adapter(served: tuple[Any, Path, Oracle]) -> None:
    base, store, oracle = served
    engine = LocalEngine(base, store, Limits(batch=2, cache_bytes=2**20))
    engine.start()
    ids = prompt(5, 50)
    for number, (blend, cached) in enumerate(
        [({}, 0), ({"r8": 1.0}, 0), ({"r8": 0.5}, 0), ({"r8": 1.0}, 48), ({}, 48)]
    ):
        ticket = engine.submit(greedy(number, ids, blend, 4))
        assert ticket.tokens(60) == oracle.answer(ids, blend, 4)
        assert ticket.usage.cached == cached
    engine.stop()


def test_a_stopped_engine_gives_the_model_back(served: tuple[Any, Path, Oracle]) -> None:
    base, store, _ = served
    ids = torch.tensor([prompt(1, 12)])
    with torch.no_grad():
        before = base(ids).logits
    engine = LocalEngine(base, store, Limits(cache_bytes=2**20))
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before)  # outside of a step it is as it was, too
    engine.stop()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before)
    assert not any("forward" in vars(module) for module in base.modules())


@pytest.mark.model
def test_the_real_model_gives_each_request_what_it_gets_alone(model_path: Path, tmp_path: Path) -> None:
    """SmolLM2-135M in float32: the base, two adapters and a blend of them, arriving one by one, in steps shorter than the
    longest prompt."""
    base, tokenizer = load_model(model_path, dtype="float32")
    base.eval()
    for seed, rank in enumerate((8, 16)):
        write_adapter(base, tmp_path / f"r{rank}", lk.LoRA(rank=rank), std=0.06, seed=seed)
    oracle = Oracle(base, tmp_path)
    blends: list[dict[str, float]] = [{}, {"r8": 1.0}, {"r16": 1.0}, {"r8": 0.6, "r16": -0.3}]
    texts = ["The capital of France is", "Once upon a time, there was", "def fibonacci(n):\n    " * 6]
    requests = [
        greedy(n, tokenizer(text)["input_ids"], blend, 10)
        for n, (text, blend) in enumerate((text, blend) for blend in blends for text in texts)
    ]
    answers = [oracle.answer(request.prompt, request.blend, 10) for request in requests]
    assert len(set(map(tuple, answers))) > 8, "the adapters have an effect"
    del oracle
    engine = LocalEngine(base, tmp_path, Limits(batch=8, step_tokens=32, cache_bytes=64 << 20))
    engine.pool.start()
    for name in engine.adapters.names():
        engine.adapters.load(name)
    tickets: list[Ticket] = []
    for request in requests:
        tickets.append(engine.submit(request))
        engine.step()
    while not all(ticket.ended for ticket in tickets):
        engine.step()
    assert [ticket.tokens() for ticket in tickets] == answers
    engine.stop()
