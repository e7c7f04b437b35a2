"""Tokens of tickets as OpenAI's answers: whole, or as the events of a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from starlette.responses import Response
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from lorakit.serve.http.faults import Fault, fault_of
from lorakit.serve.http.front import Front, Order, unfinished
from lorakit.serve.http.schema import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ChatRequest,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from lorakit.serve.http.text import Writer
from lorakit.serve.request import Ticket, Token

Reason = Literal["stop", "length"]


# -- reading tickets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A token with what it adds to the answer; `reason` is set where the answer ends with it."""

    token: Token
    text: str
    reason: Reason | None = None


async def steps_of(tickets: Sequence[Ticket], writers: Sequence[Writer]) -> AsyncIterator[tuple[int, Step]]:
    """The steps of several tickets as they come, each with the ticket's place. A stop string cancels its ticket.

    Raises:
        Fault: a ticket ended without its answer being finished.
    """
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()

    def wake() -> None:  # called by the engine's thread, which outlives no loop gladly
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(arrived.set)

    for ticket in tickets:
        ticket.listen(wake)
    unended = set(range(len(tickets)))
    while unended:
        await arrived.wait()
        arrived.clear()
        for place in sorted(unended):
            # until nothing is left: a failure is raised after the steps before it
            while place in unended and (tokens := tickets[place].take()):
                for token in tokens:
                    step = written(token, writers[place])
                    yield place, step
                    if step.reason is not None:
                        unended.discard(place)
                        tickets[place].cancel()
                        break


def written(token: Token, writer: Writer) -> Step:
    """A token as a step. The text of a token that ends an answer is no part of it."""
    if token.finish not in (None, "stop", "length"):
        raise unfinished(token.finish)
    text = writer.push(token.id) if token.id is not None and token.finish != "stop" else ""
    if writer.stopped:
        return Step(token, text, "stop")
    if token.finish is None:
        return Step(token, text)
    text += writer.finish()
    return Step(token, text, "stop" if writer.stopped else token.finish)


class Watch:
    """Cancels the tickets of an order as soon as its client has left."""

    def __init__(self, receive: Receive, order: Order) -> None:
        self.order, self.left = order, False
        self._task = asyncio.create_task(self._wait(receive))

    async def _wait(self, receive: Receive) -> None:
        while True:
            message: AsgiMessage = await receive()
            if message["type"] == "http.disconnect":
                self.left = True
                self.order.cancel()
                return

    async def stop(self) -> None:
        """Watch no more."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


# -- the two shapes ------------------------------------------------------------------------------------------------------------


class Chat:
    """/v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, front: Front, asked: ChatRequest) -> None:
        self.front, self.asked = front, asked

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice: who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        """A step as a chunk's choice."""
        delta = {"content": step.text} if step.text or step.reason is None else {}
        logprobs = self._logprobs([step])
        shown = logprobs.model_dump() if logprobs is not None else None
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": step.reason}

    def answer(self, head: dict[str, Any], answers: Sequence[Sequence[Step]], usage: Usage) -> ChatAnswer:
        """Everything at once."""
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content="".join(step.text for step in steps)),
                logprobs=self._logprobs(steps),
                finish_reason=steps[-1].reason or "stop",
            )
            for index, steps in enumerate(answers)
        ]
        return ChatAnswer(**head, choices=choices, usage=usage)

    def _logprobs(self, steps: Iterable[Step]) -> ChatLogprobs | None:
        if self.asked.reported is None:
            return None
        content = []
        for token in (step.token for step in steps):
            if token.id is None or token.logprob is None:
                continue
            text, raw = self.front.pieces(token.id)
            top = [self._top(one, logprob) for one, logprob in token.top]
            content.append(TokenLogprob(token=text, bytes=raw, logprob=token.logprob, top_logprobs=top))
        return ChatLogprobs(content=content)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text, raw = self.front.pieces(token)
        return TopLogprob(token=text, bytes=raw, logprob=logprob)


class Completion:
    """/v1/completions."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, front: Front, asked: CompletionRequest, prompts: Sequence[Sequence[int]]) -> None:
        self.front, self.asked = front, asked
        self.echoes = [""] * len(prompts)
        if asked.echo:
            self.echoes = [
                given if isinstance(given, str) else front.tokenizer.decode(given) for given in asked.prompts
            ]
        self._written = [0] * (len(prompts) * asked.choices)

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.asked.choices]

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice: the prompt, where it is to be echoed."""
        echo = self._echo(index)
        return {"index": index, "text": echo, "logprobs": None, "finish_reason": None} if echo else None

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        """A step as a chunk's choice."""
        logprobs = self._logprobs([step], index)
        shown = logprobs.model_dump() if logprobs is not None else None
        return {"index": index, "text": step.text, "logprobs": shown, "finish_reason": step.reason}

    def answer(self, head: dict[str, Any], answers: Sequence[Sequence[Step]], usage: Usage) -> CompletionAnswer:
        """Everything at once."""
        choices = [
            CompletionChoice(
                index=index,
                text=self._echo(index) + "".join(step.text for step in steps),
                logprobs=self._logprobs(steps, index),
                finish_reason=steps[-1].reason or "stop",
            )
            for index, steps in enumerate(answers)
        ]
        return CompletionAnswer(**head, choices=choices, usage=usage)

    def _logprobs(self, steps: Iterable[Step], index: int) -> CompletionLogprobs | None:
        if self.asked.logprobs is None:
            return None
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for step in steps:
            token = step.token
            if token.id is not None:
                found.tokens.append(self.front.pieces(token.id)[0])
                found.token_logprobs.append(token.logprob)
                assert found.top_logprobs is not None
                found.top_logprobs.append({self.front.pieces(one)[0]: logprob for one, logprob in token.top})
                found.text_offset.append(self._written[index])
            self._written[index] += len(step.text)
        return found


Shape = Chat | Completion


# -- answering -----------------------------------------------------------------------------------------------------------------


def usage_of(order: Order, choices: int, generated: int) -> Usage:
    """What a request cost: each prompt counts once, however many answers it has."""
    firsts = order.tickets[::choices]
    prompt = sum(ticket.usage.prompt for ticket in firsts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(ticket.usage.cached for ticket in firsts)),
    )


async def respond(front: Front, shape: Shape, order: Order, receive: Receive, note: dict[str, Any]) -> Response:
    """The HTTP answer to an order whose tickets have been submitted; the order is closed with it.

    A stream begins with the first token, so that what fails before that is an ordinary error with its status.
    """
    asked = shape.asked
    head = {
        "id": order.key,
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": front.fingerprint(order.blend),
    }
    lazy = not asked.stream and asked.reported is None
    writers = [Writer(front.tokenizer, asked.stops, lazy) for _ in order.tickets]
    watch = Watch(receive, order)
    steps = steps_of(order.tickets, writers)
    streams = False
    try:
        if asked.stream:
            first = await anext(steps)
            streams = True
            return EventStream(_events(shape, order, head, first, steps), order, watch, front.bounds.stall, note)
        answers: list[list[Step]] = [[] for _ in order.tickets]
        async for place, step in steps:
            answers[place].append(step)
        generated = sum(step.token.id is not None for answer in answers for step in answer)
        whole = shape.answer(head, answers, usage_of(order, asked.choices, generated))
        return Response(whole.model_dump_json(), media_type="application/json")
    except Fault:
        if watch.left:
            raise Fault(499, "the client left before its answer was there.", "client_left") from None
        raise
    finally:
        if not streams:
            await watch.stop()
            order.close()
            note |= order.note()


async def _events(
    shape: Shape, order: Order, head: dict[str, Any], first: tuple[int, Step], steps: AsyncIterator[tuple[int, Step]]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream."""
    asked = shape.asked
    wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    head = {**head, "object": shape.chunk_object} | ({"usage": None} if wants_usage else {})
    for index in range(len(order.tickets)):
        choice = shape.opening(index)
        if choice is not None:
            yield {**head, "choices": [choice]}

    async def every() -> AsyncIterator[tuple[int, Step]]:
        yield first
        async for one in steps:
            yield one

    generated = 0
    async for index, step in every():
        generated += step.token.id is not None
        if step.text or step.reason or (asked.reported is not None and step.token.id is not None):
            yield {**head, "choices": [shape.piece(index, step)]}
    if wants_usage:
        yield {**head, "choices": [], "usage": usage_of(order, asked.choices, generated).model_dump()}


class EventStream(Response):
    """Server-sent events of an order. A client that leaves, or leaves its stream unread for too long, ends the order."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], order: Order, watch: Watch, stall: float, note: dict[str, Any]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.order, self.watch, self.stall, self.note = events, order, watch, stall, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._pass_on(send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self.events.aclose()  # type: ignore[attr-defined]
            await self.watch.stop()
            self.order.close()
            self.note |= self.order.note()

    async def _pass_on(self, send: Send) -> None:
        try:
            async for event in self.events:
                await self._send(send, event)
            await self._send(send, None)
        except TimeoutError:
            self.note["ended"] = "the client left its stream unread"
            raise Fault(408, f"the stream was left unread for {self.stall:.0f} s.", "stalled") from None
        except Exception as error:
            if self.watch.left:
                self.note["ended"] = "the client left"
                return
            fault = fault_of(error)
            self.note["ended"] = fault.code
            if fault.code == "internal":
                self.note["error"] = repr(error)
            await self._send(send, fault.body())

    async def _send(self, send: Send, event: dict[str, Any] | None) -> None:
        text = "data: [DONE]\n\n" if event is None else f"data: {_json(event)}\n\n"
        message = {"type": "http.response.body", "body": text.encode(), "more_body": True}
        await asyncio.wait_for(send(message), self.stall)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
