"""Activated LoRA in the engine: the base's pages before the invocation, the adapter's from its first token on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.serve.engine import scheduler
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.model.cache import PAGE
from lorakit.serve.model.packed import PackedAdapter
from lorakit.serve.request import Refused
from serving.small import Oracle, greedy, model, prompt, write_adapter

CALL = (7, 8, 8)
BEFORE = prompt(1, 70)
"""What was said before; longer than a step of the small engine."""
TURNS = [*BEFORE, *CALL, 11, 12]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Oracle]:
    base, folder = model(), tmp_path_factory.mktemp("activated")
    for seed, name in enumerate(("one", "two")):
        write_adapter(base, folder / name, lk.ALoRA(rank=3, invocation=CALL), std=0.4, seed=seed)
    write_adapter(base, folder / "lora", lk.LoRA(rank=3), std=0.4, seed=5)
    return base, folder, Oracle(base, folder)


def engine_over(store: tuple[Any, Path, Oracle], **options: Any) -> LocalEngine:
    engine = LocalEngine(store[0], store[1], Limits(batch=8, step_tokens=24, cache_bytes=2**21), **options)
    engine.pool.start()
    for name in engine.adapters.names():
        engine.adapters.load(name)
    return engine


def ask(engine: LocalEngine, ids: list[int], blend: dict[str, float], count: int = 6) -> tuple[list[int], int]:
    """An answer, and the prompt tokens that were computed for it."""
    before = engine.stats().prompt_tokens
    ticket = engine.submit(greedy(f"{len(ids)} {blend} {before}", ids, blend, count))
    while not ticket.ended:
        engine.step()
    return ticket.tokens(), engine.stats().prompt_tokens - before


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_a_call_after_a_long_context_computes_the_invocation_alone(store: Any, compiled: bool) -> None:
    """The conversation was the base's; the adapter's turn reads its pages, a LoRA's computes all of it again. What it answers
    is what `generate` does, and a further turn of the base finds nothing of the adapter's."""
    oracle = store[2]
    engine = engine_over(store, compiled=compiled)
    try:
        assert ask(engine, BEFORE, {}) == (oracle.answer(BEFORE, {}, 6), len(BEFORE))
        rest = len(TURNS) - len(BEFORE) // PAGE * PAGE
        for name, computed in (("one", rest), ("two", rest), ("lora", len(TURNS))):
            assert ask(engine, TURNS, {name: 1.0}) == (oracle.answer(TURNS, {name: 1.0}, 6), computed)
        answer = oracle.answer(TURNS, {"one": 1.0}, 30)
        assert ask(engine, TURNS, {"one": 1.0}, 30)[0] == answer
        further = [*TURNS, *answer, *prompt(3, 20)]  # the base again: nothing that the adapter has written
        assert ask(engine, further, {}) == (oracle.answer(further, {}, 6), len(further) - len(BEFORE) // PAGE * PAGE)
        again = [*further, *CALL, 9]  # a second call: the last one counts, and what lies between is the base's
        used = len(further) // PAGE * PAGE
        assert ask(engine, again, {"one": 1.0}) == (oracle.answer(again, {"one": 1.0}, 6), len(again) - used)
    finally:
        engine.stop()


def mixed(store: Any) -> list[bool]:
    """Base, both adapters, a LoRA and a blend at once, from an empty cache and in small steps: who is as alone."""
    engine = engine_over(store)
    blends: list[dict[str, float]] = [{}, {"one": 1.0}, {"two": 0.5}, {"lora": 1.0}, {"one": 0.7, "lora": 0.3}]
    cases = [(ids, blend) for ids in (TURNS, [*CALL, *BEFORE], [*BEFORE[:13], 7, *CALL]) for blend in blends]
    tickets = [engine.submit(greedy(n, ids, blend, 5)) for n, (ids, blend) in enumerate(cases)]
    while not all(ticket.ended for ticket in tickets):
        engine.step()
    engine.stop()
    return [
        ticket.tokens() == store[2].answer(ids, blend, 5) for ticket, (ids, blend) in zip(tickets, cases, strict=True)
    ]


def test_any_mixture_is_as_each_alone(store: Any) -> None:
    assert all(mixed(store))


@pytest.mark.parametrize("bug", ["one token late", "keys of the base alone"])
def test_the_law_catches(store: Any, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    if bug == "one token late":
        start = PackedAdapter.start
        monkeypatch.setattr(PackedAdapter, "start", lambda self, ids: (start(self, ids) or 0) + bool(self.invocation))
    else:
        monkeypatch.setattr(scheduler.Job, "page_key", lambda self, page: "")
    if bug == "one token late":
        assert not all(mixed(store))
        return
    engine = engine_over(store)
    long = [*TURNS, *prompt(2, 40)]
    ask(engine, long, {})
    assert ask(engine, long, {"one": 1.0})[0] != store[2].answer(long, {"one": 1.0}, 6)
    engine.stop()


def test_a_prompt_without_the_invocation_is_refused(store: Any) -> None:
    engine = engine_over(store)
    with pytest.raises(Refused, match=r"'one' acts from its invocation on, the tokens 7, 8, 8"):
        ask(engine, [7, 8, 9], {"one": 1.0})
    engine.stop()


def test_the_answer_is_pefts(store: Any) -> None:
    peft = pytest.importorskip("peft")
    folder = store[1]
    engine = engine_over(store)
    found, _ = ask(engine, TURNS, {"one": 1.0})
    engine.stop()
    theirs = peft.PeftModel.from_pretrained(model(), folder / "one").eval()
    options: Any = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        ids = torch.tensor([TURNS])
        answer = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert answer[0, len(TURNS) :].tolist() == found
