"""Tokens of tickets as OpenAI's answers: whole, or as the events of a stream."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorakit.files.prompt import Prompter
from lorakit.serve.http.bodies import (
    Answer,
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
    PromptLogprob,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from lorakit.serve.http.faults import Fault, fault_of
from lorakit.serve.http.front import Front, Order, unfinished
from lorakit.serve.http.text import Detokenizer, TokenTexts
from lorakit.serve.request import PromptToken, Ticket, Token, arrivals

Reason = Literal["stop", "length"]


# -- reading tickets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A token with what it adds to the answer; `reason` is set where the answer ends with it."""

    token: Token
    text: str
    reason: Reason | None = None


async def steps_of(tickets: Sequence[Ticket], writers: Sequence[Detokenizer]) -> AsyncIterator[tuple[int, Step]]:
    """The steps of several tickets as they come, each with the ticket's place. A stop string cancels its ticket.

    Raises:
        Fault: a ticket ended without its answer being finished.
    """
    unended = set(range(len(tickets)))
    async for place, tokens in arrivals(tickets, unended):
        for token in tokens:
            step = written(token, writers[place])
            yield place, step
            if step.reason is not None:
                unended.discard(place)
                tickets[place].cancel()
                break


def written(token: Token, writer: Detokenizer) -> Step:
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
    """Cancels the tickets of an order as soon as its client has left; `close` ends the order and notes it for the log."""

    def __init__(self, receive: Receive, order: Order, note: dict[str, Any]) -> None:
        self.order, self.note, self.left = order, note, False
        self._task = asyncio.create_task(self._wait(receive))

    async def _wait(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.order.cancel()

    async def close(self) -> None:
        """The answer is there, or nobody waits for it any more."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self.order.close()
        self.note |= self.order.note()


# -- the two shapes ------------------------------------------------------------------------------------------------------------


class Shape(ABC):
    """One of the two kinds of completion: how its answers and the chunks of its streams look."""

    whole: Callable[..., Answer]
    chunk_object: str

    def __init__(self, front: Front, asked: ChatRequest | CompletionRequest, prompter: Prompter) -> None:
        self.front, self.asked, own = front, asked, prompter.tokenizer
        self.texts = front.token_texts if own is front.tokenizer else TokenTexts(own)

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """What the first chunk of a choice adds, before any token."""

    @abstractmethod
    def content(self, step: Step) -> dict[str, Any]:
        """What a chunk's choice says of a step's text."""

    @abstractmethod
    def choice(self, steps: Sequence[Step], *, index: int, **rest: Any) -> BaseModel:
        """All steps of an answer as a choice."""

    @abstractmethod
    def probabilities(self, index: int, steps: Iterable[Step]) -> BaseModel:
        """The probabilities of these steps."""

    def _logprobs(self, index: int, steps: Iterable[Step]) -> BaseModel | None:
        return None if self.asked.reported is None else self.probabilities(index, steps)

    def chunk(self, index: int, content: dict[str, Any], step: Step | None = None) -> dict[str, Any]:
        """A choice of a chunk."""
        logprobs = self._logprobs(index, [step]) if step is not None else None
        shown = logprobs.model_dump() if logprobs is not None else None
        return {"index": index, **content, "logprobs": shown, "finish_reason": step.reason if step else None}

    def answer(self, head: dict[str, Any], answers: Sequence[Sequence[Step]], usage: Usage) -> Answer:
        """Everything at once."""
        choices = [
            self.choice(
                steps,
                index=index,
                logprobs=self._logprobs(index, steps),
                finish_reason=steps[-1].reason or "stop",
            )
            for index, steps in enumerate(answers)
        ]
        return self.whole(**head, choices=choices, usage=usage)


class Chat(Shape):
    """/v1/chat/completions."""

    whole, chunk_object = ChatAnswer, "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def content(self, step: Step) -> dict[str, Any]:
        """The text, where the step has any."""
        return {"delta": {"content": step.text} if step.text or step.reason is None else {}}

    def choice(self, steps: Sequence[Step], *, index: int, **rest: Any) -> ChatChoice:
        """The answer as a message."""
        message = AnswerMessage(content="".join(step.text for step in steps))
        return ChatChoice(index=index, message=message, **rest)

    def probabilities(self, index: int, steps: Iterable[Step]) -> ChatLogprobs:
        """Token by token."""
        content = [
            TokenLogprob(
                **self._named(token.id, token.logprob),
                top_logprobs=[TopLogprob(**self._named(one, logprob)) for one, logprob in token.top],
            )
            for token in (step.token for step in steps)
            if token.id is not None and token.logprob is not None
        ]
        return ChatLogprobs(content=content)

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.texts(token)
        return {"token": text, "bytes": raw, "logprob": logprob}


class Completion(Shape):
    """/v1/completions."""

    whole, chunk_object = CompletionAnswer, "text_completion"
    asked: CompletionRequest

    def __init__(
        self, front: Front, asked: CompletionRequest, prompter: Prompter, prompts: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(front, asked, prompter)
        decode = prompter.tokenizer.decode
        self.prompts, self.count = prompts, asked.n or 1
        self.echoes = [given if isinstance(given, str) else decode(given) for given in asked.prompts if asked.echo]
        self._written = [len(self._echo(index)) for index in range(len(asked.prompts) * self.count)]

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.count] if self.echoes else ""

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.asked.return_tokens_as_token_ids else self.texts(token)[0]

    def answer(self, head: dict[str, Any], answers: Sequence[Sequence[Step]], usage: Usage) -> Answer:
        """Everything at once; of the answers to each prompt the best, where more were made than are given."""
        if self.asked.ranked:
            made = self.asked.choices
            groups = (answers[first : first + made] for first in range(0, len(answers), made))
            answers = [one for group in groups for one in sorted(group, key=_mean, reverse=True)[: self.count]]
        return super().answer(head, answers, usage)

    def _logprobs(self, index: int, steps: Iterable[Step]) -> BaseModel | None:
        return None if self.asked.logprobs is None else self.probabilities(index, steps)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt, where it is to be echoed."""
        return {"text": echo} if (echo := self._echo(index)) else None

    def content(self, step: Step) -> dict[str, Any]:
        """The text."""
        return {"text": step.text}

    def choice(self, steps: Sequence[Step], *, index: int, **rest: Any) -> CompletionChoice:
        """The answer as a text."""
        if self.asked.prompt_logprobs is not None:
            rest["prompt_logprobs"] = [self._scored(one) for step in steps for one in step.token.prompt]
        if self.asked.return_token_ids:
            rest["prompt_token_ids"] = list(self.prompts[index // self.count])
            rest["token_ids"] = [step.token.id for step in steps if step.token.id is not None]
        return CompletionChoice(index=index, text=self._echo(index) + "".join(step.text for step in steps), **rest)

    def _scored(self, token: PromptToken) -> dict[int, PromptLogprob] | None:
        """One token of a prompt in vLLM's form: it, and the most probable ones."""
        if token.logprob is None or token.rank is None:
            return None
        known = [(token.id, token.logprob, token.rank)]
        known += [
            (one, logprob, rank) for rank, (one, logprob) in enumerate(token.top[: self.asked.prompt_logprobs], 1)
        ]
        return {
            one: PromptLogprob(logprob=logprob, rank=rank, decoded_token=self.texts(one)[0])
            for one, logprob, rank in reversed(known)
        }

    def probabilities(self, index: int, steps: Iterable[Step]) -> CompletionLogprobs:
        """In parallel lists."""
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])

        def add(token: int, logprob: float | None, top: Sequence[tuple[int, float]], offset: int) -> None:
            found.tokens.append(self._name(token))
            found.token_logprobs.append(logprob)
            named: dict[str, float] | None = None
            if logprob is not None:
                named = {}
                # two tokens may have one text: the more probable one's number stays
                for one, number in (*top[: self.asked.logprobs], (token, logprob)):
                    named.setdefault(self._name(one), number)
            found.top_logprobs.append(named)
            found.text_offset.append(offset)

        for step in steps:
            if self.asked.echo:
                place, end = 0, len(self._echo(index))
                for scored in step.token.prompt:
                    add(scored.id, scored.logprob, scored.top, min(place, end))
                    place += len(self.texts(scored.id)[0])
            if step.token.id is not None:
                add(step.token.id, step.token.logprob, step.token.top, self._written[index])
            self._written[index] += len(step.text)
        return found


def _mean(steps: Sequence[Step]) -> float:
    """The mean log probability of an answer's tokens."""
    found = [step.token.logprob for step in steps if step.token.logprob is not None]
    return sum(found) / max(1, len(found))


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
    writers = [Detokenizer(order.prompter.tokenizer, asked.stops, lazy) for _ in order.tickets]
    watch = Watch(receive, order, note)
    steps = steps_of(order.tickets, writers)
    streams = False
    try:
        if asked.stream:
            first = await anext(steps)
            streams = True
            return EventStream(_events(shape, order, head, first, steps), watch, front.bounds.stall)
        answers: list[list[Step]] = [[] for _ in order.tickets]
        async for place, step in steps:
            answers[place].append(step)
        generated = sum(step.token.id is not None for answer in answers for step in answer)
        usage = usage_of(order, asked.choices, generated)

        def body() -> str:
            return shape.answer(head, answers, usage).model_dump_json()

        # log probabilities of prompts are many numbers, for which nobody else should wait
        return Response(
            body() if asked.scored is None else await run_in_threadpool(body), media_type="application/json"
        )
    except Fault:
        if watch.left:
            raise Fault(499, "the client disconnected before its answer was complete.", "client_left") from None
        raise
    finally:
        if not streams:
            await watch.close()


async def _events(
    shape: Shape, order: Order, head: dict[str, Any], first: tuple[int, Step], steps: AsyncIterator[tuple[int, Step]]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream."""
    asked = shape.asked
    wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    head = {**head, "object": shape.chunk_object} | ({"usage": None} if wants_usage else {})
    for index in range(len(order.tickets)):
        if (opening := shape.opening(index)) is not None:
            yield {**head, "choices": [shape.chunk(index, opening)]}
    generated = 0
    following: tuple[int, Step] | None = first
    while following is not None:
        index, step = following
        generated += step.token.id is not None
        if step.text or step.reason or (asked.reported is not None and step.token.id is not None):
            yield {**head, "choices": [shape.chunk(index, shape.content(step), step)]}
        following = await anext(steps, None)
    if wants_usage:
        yield {**head, "choices": [], "usage": usage_of(order, asked.choices, generated).model_dump()}


class EventStream(Response):
    """Server-sent events of an order. A client that leaves, or leaves its stream unread for too long, ends the order."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], watch: Watch, stall: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.watch, self.stall = events, watch, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._pass_on(send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self.events.aclose()  # type: ignore[attr-defined]
            await self.watch.close()

    async def _pass_on(self, send: Send) -> None:
        note = self.watch.note
        try:
            async for event in self.events:
                await self._send(send, json.dumps(event, ensure_ascii=False, separators=(",", ":")))
            await self._send(send, "[DONE]")
        except TimeoutError:
            note["ended"] = "the client left its stream unread"
            raise Fault(408, f"the stream was left unread for {self.stall:.0f} s.", "stalled") from None
        except Exception as error:
            if self.watch.left:
                note["ended"] = "the client left"
                return
            fault = fault_of(error)
            note["ended"] = fault.code
            if fault.code == "internal":
                note["error"] = repr(error)
            await self._send(send, json.dumps(fault.body(), ensure_ascii=False))

    async def _send(self, send: Send, data: str) -> None:
        message = {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
        await asyncio.wait_for(send(message), self.stall)
