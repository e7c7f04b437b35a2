"""The contract: a ticket is read by threads and event loops alike, and nothing out of range becomes a request."""

from __future__ import annotations

import asyncio
import threading

import pytest

from lorakit.serve.request import Failed, Overloaded, Refused, Request, Sampling, Ticket, Token


def ticket() -> Ticket:
    return Ticket(Request("1", (1, 2, 3)))


def test_a_ticket_is_read_while_it_is_written() -> None:
    one = ticket()
    seen: list[int | None] = []
    reader = threading.Thread(target=lambda: seen.extend(step.id for step in one))
    reader.start()
    for number in range(5):
        one.put(Token(number, finish="length" if number == 4 else None))
    one.put(Token(9))  # after the end: not part of the answer
    reader.join(5)
    assert seen == [0, 1, 2, 3, 4]
    assert (one.usage.prompt, one.usage.generated) == (3, 5)
    assert one.usage.first is not None
    assert one.ended


def test_a_ticket_is_read_in_an_event_loop() -> None:
    one = ticket()

    async def read() -> list[int | None]:
        threading.Timer(0.01, lambda: [one.put(Token(7)), one.put(Token(None, finish="cancelled"))]).start()
        return [step.id async for step in one]

    assert asyncio.run(read()) == [7, None]
    assert one.usage.generated == 1


def test_a_failure_comes_after_the_steps_before_it() -> None:
    one = ticket()
    one.put(Token(1))
    one.fail(Failed("the loop ended"))
    steps = iter(one)
    assert next(steps).id == 1
    with pytest.raises(Failed, match="the loop ended"):
        next(steps)
    with pytest.raises(Failed):
        one.result()


def test_a_listener_is_told_of_every_step() -> None:
    one = ticket()
    told: list[int] = []
    one.put(Token(4))
    one.listen(lambda: told.append(1))
    assert [step.id for step in one.take()] == [4]
    assert one.take() == []
    one.put(Token(5))
    one.fail(Failed("gone"))
    assert len(told) == 3
    assert [step.id for step in one.take()] == [5]
    with pytest.raises(Failed):
        one.take()


def test_waiting_has_a_limit() -> None:
    with pytest.raises(TimeoutError, match="request 1 has not ended"):
        ticket().result(timeout=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens was given as 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature was given as nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3"),
        ({"logprobs": 1000}, "logprobs"),
    ],
)
def test_sampling_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(Refused, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_requests_out_of_range_are_refused() -> None:
    with pytest.raises(Refused, match="prompt is empty"):
        Request("1", ())
    with pytest.raises(Refused, match="weight was given as 0"):
        Request("1", (1,), weight=0)
    with pytest.raises(Refused, match="adapter 'a'"):
        Request("1", (1,), {"a": float("nan")})


def test_who_pays() -> None:
    assert Request("1", (1,), {"b": 0.5, "a": 0.5}).payer == "a+b"
    assert Request("1", (1,), {"a": 1.0}, tenant="t").payer == "t"
    assert Request("1", (1,)).payer == ""
    assert Overloaded("full", 2.5).retry_after == 2.5
