"""Log probabilities of prompts against the model alone: in chunks, beside others, behind the prefix cache, sent back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.serve.engine import scores
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.request import Failed, PromptToken, Request, Sampling, Ticket
from serving.small import greedy, model, prompt, write_adapter

BOUND = 2e-5
"""float32, of numbers around -5: some sixty roundings."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    base = model()
    for seed, name in enumerate(["one", "two"]):
        write_adapter(base, folder / name, seed=seed)
    write_adapter(base, folder / "front", lk.PromptTuning(tokens=3))
    write_adapter(base, folder / "alone", lk.SHiRA(rank=2))
    return folder


def expected(store: Path, tokens: Sequence[int], blend: Mapping[str, float]) -> torch.Tensor:
    """log_softmax (tokens - 1, vocabulary) of the model alone."""
    base = model()
    for name in blend:
        lk.load(base, store / name, active=False)
    with torch.no_grad(), lk.use(base, dict(blend)) if blend else nullcontext():
        return base(torch.tensor([list(tokens)])).logits[0, :-1].log_softmax(-1)  # type: ignore[no-any-return]


def scored(number: int, tokens: Sequence[int], blend: Mapping[str, float], count: int = 0, top: int = 3) -> Request:
    how = Sampling(max_tokens=count, temperature=0, ignore_eos=True, prompt_logprobs=top, logprobs=top)
    return Request(str(number), tuple(tokens), blend, sampling=how)


def check(ticket: Ticket, store: Path, top: int = 3) -> None:
    """The first step's numbers against transformers'."""
    found: tuple[PromptToken, ...] = ticket.result(0)[0].prompt
    tokens = ticket.request.prompt
    assert found[0] == PromptToken(tokens[0])
    assert [one.id for one in found] == list(tokens)
    want = expected(store, tokens, ticket.request.blend)
    for one, row in zip(found[1:], want, strict=True):
        assert one.logprob == pytest.approx(float(row[one.id]), abs=BOUND)
        values, ids = row.topk(top)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [number for _, number in one.top] == pytest.approx(values.tolist(), abs=BOUND)
        assert one.rank == 1 + int((row > row[one.id]).sum())
        if one.rank == 1:  # what lm-evaluation-harness calls greedy
            assert one.top[0][1] == one.logprob


def run(engine: LocalEngine, tickets: Sequence[Ticket]) -> None:
    for _ in range(400):
        if all(ticket.ended for ticket in tickets):
            return
        if not engine.step():
            engine._lock.acquire()
            engine._lock.wait(0.01)
            engine._lock.release()
    raise AssertionError("not ended")


def engine_over(store: Path, rows: int = 7, **limits: Any) -> LocalEngine:
    given = {"batch": 8, "step_tokens": 24, "cache_bytes": 4 << 20, "adapter_bytes": 4 << 20} | limits
    engine = LocalEngine(model(), store, Limits(**given), compiled=False)
    engine.pool.start()
    engine._state = "ready"
    engine.scheduler.rows = rows
    return engine


def test_every_prompt_of_a_mixed_batch(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "PIECE", 3 * 4 * 160)  # three rows at a time
    engine = engine_over(store)
    seen: list[int] = []
    forward = engine.model.forward

    def watched(batch: Any, cache: Any) -> torch.Tensor:
        logits = forward(batch, cache)
        seen.append(logits.shape[0])
        return logits

    engine.model.forward = watched  # type: ignore[method-assign]
    blends: list[dict[str, float]] = [{}, {"one": 1.0}, {"front": 1.0}, {"one": 0.7, "two": 0.3}]
    asked = [scored(n, prompt(n, 5 + 9 * n), blends[n % 4], count=n % 3) for n in range(6)]
    tickets = [engine.submit(one) for one in [*asked, greedy(9, prompt(9, 40), {"one": 1.0}, 12)]]
    run(engine, tickets)
    engine.stop()
    for ticket in tickets[:-1]:
        check(ticket, store)
    assert max(seen) <= 7 + len(tickets)  # the rows of prompts, and one of each that goes on
    assert not tickets[-1].result(0)[0].prompt


def test_a_cached_prefix_is_computed_again_and_shared_on(store: Path) -> None:
    engine = engine_over(store, rows=1000)
    tokens = prompt(3, 70)
    warm = engine.submit(greedy(0, tokens, {"one": 1.0}, 2))
    run(engine, [warm])
    asked = engine.submit(scored(1, tokens, {"one": 1.0}))
    run(engine, [asked])
    check(asked, store)
    assert asked.usage.cached == 0
    after = engine.submit(greedy(2, tokens, {"one": 1.0}, 2))
    run(engine, [after])
    engine.stop()
    assert after.usage.cached == 64
    assert after.tokens() == warm.tokens()


def test_sent_back_in_the_middle(store: Path) -> None:
    """Pages run out: what is scored already is not scored again, and nothing is missing."""
    probe = engine_over(store)
    page = probe.cache.page_bytes
    probe.stop()
    engine = engine_over(store, cache_bytes=9 * page)
    tickets = [engine.submit(scored(n, prompt(n, 45), {}, count=40)) for n in range(3)]
    sent: list[int] = []
    back = engine.scheduler._send_back

    def watched(job: Any) -> None:
        sent.append(len(job.scores))
        back(job)

    engine.scheduler._send_back = watched  # type: ignore[method-assign]
    run(engine, tickets)
    engine.stop()
    assert sent
    for ticket in tickets:
        check(ticket, store)
        assert len(ticket.tokens()) == 40


def test_an_adapter_that_is_computed_by_itself(store: Path) -> None:
    engine = engine_over(store, rows=100)
    tickets = [engine.submit(scored(n, prompt(n, 20), {"alone": 1.0}, count=n)) for n in range(2)]
    run(engine, tickets)
    for ticket in tickets:
        check(ticket, store)
    engine.scheduler.rows = 10
    refused = engine.submit(scored(5, prompt(5, 20), {"alone": 1.0}))
    run(engine, [refused])
    engine.stop()
    with pytest.raises(lk.LorakitError, match="10 are the most"):
        refused.result(0)


def test_numbers_that_are_not_finite_end_their_own_answer(store: Path) -> None:
    base = model()
    adapter = lk.attach(base, lk.LoRA(rank=2), name="x")
    for parameter in adapter.parameters():
        torch.nn.init.constant_(parameter, 1e30)
    adapter.save(store / "broken")
    engine = engine_over(store)
    tickets = [engine.submit(scored(0, prompt(0, 9), {"broken": 1.0})), engine.submit(scored(1, prompt(1, 9), {}))]
    run(engine, tickets)
    engine.stop()
    with pytest.raises(Failed, match="broken"):
        tickets[0].result(0)
    check(tickets[1], store)
