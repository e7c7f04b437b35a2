"""Fair between payers, in order within each, and nobody is overtaken beyond the stated bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import LorakitError
from lorakit.serve.engine.engine import LocalEngine
from lorakit.serve.engine.scheduler import Limits
from lorakit.serve.request import Overloaded, Refused, Request, Sampling, Ticket, TooLong, UnknownAdapter
from serving.small import Oracle, greedy, model, prompt, write_adapter


def drive(engine: LocalEngine, tickets: list[Ticket]) -> list[str]:
    """Step until all have ended; the ids in the order in which they did."""
    order: list[str] = []
    while len(order) < len(tickets):
        engine.step()
        order += [t.request.id for t in tickets if t.ended and t.request.id not in order]
    return order


def test_a_flood_on_one_adapter_delays_another_by_no_more_than_stated(tmp_path: Path) -> None:
    """The batch is full of the flood, sixty more wait. Another adapter's requests get in as soon as one running request ends,
    and from then on the flood gets no more virtual tokens than they do, and one request more for each place."""
    base = model()
    for name in ("flood", "other"):
        write_adapter(base, tmp_path / name)
    engine = LocalEngine(base, tmp_path, Limits(batch=4, cache_bytes=2**22))
    engine.pool.start()
    engine.adapters.load("flood")
    engine.adapters.load("other")
    flood = [engine.submit(greedy(f"f{n}", prompt(n, 8), {"flood": 1.0}, 8)) for n in range(64)]
    for _ in range(12):
        engine.step()
    before = engine.stats().generated_tokens
    others = [engine.submit(greedy(f"o{n}", prompt(n, 8), {"other": 1.0}, 8)) for n in range(6)]
    drive(engine, others)
    generated = engine.stats().generated_tokens - before - 6 * 8
    in_flight, one_each = 4 * 8, 4 * 8
    assert generated <= in_flight + 6 * 8 + one_each
    assert sum(ticket.ended for ticket in flood) < 32
    # Counted in tokens of later arrivals: nothing of the flood that came later went before them.
    assert all(ticket.usage.overtaken == 0 for ticket in others)
    drive(engine, flood)
    engine.stop()


def test_weights_share_the_machine(tmp_path: Path) -> None:
    engine = LocalEngine(model(), None, Limits(batch=2, cache_bytes=2**22))
    heavy = [engine.submit(greedy(f"h{n}", prompt(n, 4), {}, 6, tenant="heavy", weight=3.0)) for n in range(30)]
    light = [engine.submit(greedy(f"l{n}", prompt(n, 4), {}, 6, tenant="light")) for n in range(30)]
    for _ in range(96):
        engine.step()
    done = sum(t.usage.generated for t in heavy), sum(t.usage.generated for t in light)
    assert 2.0 < done[0] / done[1] < 4.0
    engine.stop()


def test_within_a_payer_first_come_first_served() -> None:
    engine = LocalEngine(model(), None, Limits(batch=2, cache_bytes=2**22))
    tickets = [engine.submit(greedy(n, prompt(n, 5), {}, 4, tenant="one")) for n in range(8)]
    assert drive(engine, tickets) == [str(n) for n in range(8)]
    engine.stop()


def test_a_large_request_is_passed_by_a_bounded_number_of_tokens() -> None:
    """Small requests fit beside each other, a large one only when most have gone. Without the bound they would pass it as
    long as they come."""
    limits = Limits(batch=8, cache_bytes=16 * 4096, overtake=100, step_tokens=64)
    engine = LocalEngine(model(), None, limits, reuse=False)
    small = [engine.submit(greedy(f"s{n}", prompt(n, 20), {}, 12, tenant=f"t{n % 5}")) for n in range(60)]
    for _ in range(20):
        engine.step()
    large = engine.submit(greedy("large", prompt(1, 220), {}, 4, tenant="large"))
    passed_at_start = sum(ticket.usage.started is not None for ticket in small)
    drive(engine, [large])
    passed = sum(ticket.usage.started is not None for ticket in small) - passed_at_start
    # at most `overtake` tokens and one request past it, and what other payers' counters were behind (one request each)
    assert passed * 32 <= 100 + 32 + 5 * 32
    drive(engine, small)
    engine.stop()


def test_the_queue_is_bounded_and_leaves_room_for_others() -> None:
    engine = LocalEngine(model(), None, Limits(batch=1, queue=10, cache_bytes=2**20))
    for n in range(10):
        engine.submit(greedy(f"f{n}", prompt(n, 4), {}, 2, tenant="flood"))
    engine.step()
    for n in range(10, 11):
        engine.submit(greedy(f"f{n}", prompt(n, 4), {}, 2, tenant="flood"))
    with pytest.raises(Overloaded, match="10 requests wait, 10 of them for flood; the queue holds 10") as caught:
        engine.submit(greedy("more", prompt(1, 4), {}, 2, tenant="flood"))
    assert caught.value.retry_after >= 1
    polite = engine.submit(greedy("polite", prompt(1, 4), {}, 2, tenant="polite"))
    drive(engine, [polite])
    assert engine.stats().refused == {"overloaded": 1}
    engine.stop()


def test_deadlines_and_cancelled_requests_leave_queue_and_batch() -> None:
    engine = LocalEngine(model(), None, Limits(batch=1, cache_bytes=2**20))
    running = engine.submit(greedy("running", prompt(1, 4), {}, 50))
    late = engine.submit(greedy("late", prompt(1, 4), {}, 5, deadline=0.0))
    gone = engine.submit(greedy("gone", prompt(1, 4), {}, 5))
    engine.step()
    gone.cancel()
    running.cancel()
    for _ in range(10):
        engine.step()
    assert [ticket.result(0)[-1].finish for ticket in (running, late, gone)] == ["cancelled", "timeout", "cancelled"]
    assert running.usage.generated == 1
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_bytes) == (0, 0, 0)
    assert stats.finished == {"cancelled": 2, "timeout": 1}
    engine.stop()


def test_what_cannot_be_served_is_refused_at_once(tmp_path: Path) -> None:
    engine = LocalEngine(model(), tmp_path, Limits(batch=2, cache_bytes=2**20))
    with pytest.raises(TooLong, match="prompt and answer together have 256"):
        engine.submit(greedy("long", prompt(1, 200), {}, 100))
    with pytest.raises(Refused, match="token id outside of 0 to 159"):
        engine.submit(greedy("ids", (1, 160), {}, 2))
    with pytest.raises(UnknownAdapter, match=r"unknown adapter '\.\./secret'"):
        engine.submit(greedy("path", [1], {"../secret": 1.0}, 2))
    engine.submit(greedy("same", [3], {}, 2))
    with pytest.raises(Refused, match="id 'same' is under way"):
        engine.submit(greedy("same", [3], {}, 2))
    assert engine.drain(timeout=0.0) is False
    with pytest.raises(LorakitError, match="step_tokens"):
        LocalEngine(model(), None, Limits(batch=64, step_tokens=32))
    engine.stop()
    with pytest.raises(Overloaded, match="shutting down"):
        engine.submit(greedy("after", [3], {}, 2))


def test_draining_finishes_what_was_accepted() -> None:
    base = model()
    engine = LocalEngine(base, None, Limits(batch=2, cache_bytes=2**20))
    engine.start()
    tickets = [engine.submit(greedy(n, prompt(n, 6), {}, 5)) for n in range(5)]
    assert engine.drain(timeout=60)
    assert all(ticket.usage.generated == 5 for ticket in tickets)
    assert not engine.ready()
    with pytest.raises(Overloaded):
        engine.submit(greedy("after", [3], {}, 2))
    engine.stop()
    engine.stop()


def test_a_failing_forward_ends_its_requests_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model()
    engine = LocalEngine(base, None, Limits(batch=1, cache_bytes=2**20))
    forward = engine.model.forward
    calls = []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.model, "forward", failing)
    first = engine.submit(greedy("first", prompt(1, 6), {}, 5))
    second = engine.submit(greedy("second", prompt(2, 6), {}, 5))
    engine.start()
    with pytest.raises(LorakitError, match="planted"):
        first.result(60)
    assert second.tokens(60) == Oracle(model(), Path()).answer(prompt(2, 6), {}, 5)
    assert engine.ready()
    engine.stop()


def test_end_tokens_and_stop_ids() -> None:
    base = model()
    expected = Oracle(base, Path()).answer(prompt(3, 6), {}, 12)
    engine = LocalEngine(base, None, Limits(batch=2, cache_bytes=2**20))
    end = expected[3]
    sampling = Sampling(max_tokens=12, temperature=0, stop_token_ids=(end,))
    ticket = engine.submit(Request("1", tuple(prompt(3, 6)), sampling=sampling))
    drive(engine, [ticket])
    assert ticket.tokens() == expected[: expected.index(end) + 1]
    assert ticket.result()[-1].finish == "stop"
    engine.stop()
