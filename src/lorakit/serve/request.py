"""What a client asks of an engine and what it gets back: the contract between the engine and everything in front of it.

HTTP, tenants, metrics and the cluster are written against this file alone; any object that keeps `Engine` can stand behind
them. Token ids go in and come out; text, chat templates, stop strings and JSON are the front's.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from lorakit.errors import LorakitError

Finish = Literal["stop", "length", "cancelled", "timeout"]
"""Why a request ended: an end-of-text token, its limit, its client, its deadline. A failure raises."""

State = Literal["on disk", "loading", "resident", "pinned", "draining", "refused"]
"""Where an adapter is: known only, being read, in memory, in memory for good, leaving when its requests end, unusable."""


class Refused(LorakitError):  # noqa: N818 - named by what is wrong
    """A request or an adapter that this engine will not serve; `reason` says why and what would work (HTTP 400)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnknownAdapter(Refused):
    """A request names an adapter that the engine's store does not hold (HTTP 404)."""


class TooLong(Refused):
    """Prompt and answer together do not fit into the model's context or the engine's memory (HTTP 400)."""


class Overloaded(LorakitError):  # noqa: N818 - named by what is wrong
    """The queue is full or the engine is draining; the same request may succeed in `retry_after` seconds (HTTP 429)."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Failed(LorakitError):  # noqa: N818 - named by what is wrong
    """The engine could not finish a request that it had accepted; raised where the ticket is read (HTTP 500)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_tokens: generated tokens at most.
        temperature: divides the logits; 0 is greedy.
        top_p: only the most probable tokens whose probabilities add up to this are drawn from.
        top_k: only this many of the most probable tokens are drawn from; 0 is all.
        min_p: only tokens at least this share as probable as the most probable one are drawn from.
        seed: makes the draws repeatable, whatever else is in the batch; None draws anew.
        stop_ids: token ids that end the answer, besides the model's own end-of-text ids.
        min_tokens: no such id is chosen before this many tokens.
        ignore_end: go on after the model's own end-of-text ids (for measurements).
        bias: token -> number added to its logit.
        presence_penalty: taken once off the logit of every token that was generated.
        frequency_penalty: taken off the logit of a generated token as often as it was.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and answer; 1 is none.
        logprobs: how many of the most probable tokens to report beside each chosen one; None reports no probabilities.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_end: bool = False
    bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges: tuple[tuple[str, float, float, float], ...] = (
            ("max_tokens", self.max_tokens, 1, float("inf")),
            ("temperature", self.temperature, 0, 100),
            ("top_p", self.top_p, 1e-6, 1),
            ("top_k", self.top_k, 0, float("inf")),
            ("min_p", self.min_p, 0, 1),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100),
            ("logprobs", self.logprobs or 0, 0, 100),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:  # also refuses nan
                raise Refused(f"{name} was given as {value}; it lies between {low} and {high}.")
        for token, number in self.bias.items():
            if not -1000 <= number <= 1000:
                raise Refused(f"bias of token {token} was given as {number}; it lies between -1000 and 1000.")


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        id: unique among the requests of the engine.
        prompt: token ids, at least one.
        blend: adapter -> weight; empty is the base model.
        tenant: whose virtual counter pays, "" for nobody's in particular: then each blend pays for itself.
        weight: share of the machine against other payers; 2 gets twice as many tokens under load as 1.
        deadline: seconds after submission at which the request ends with "timeout" if it has not ended before.
        sampling: how to choose tokens.
    """

    id: str
    prompt: tuple[int, ...]
    blend: Mapping[str, float] = field(default_factory=dict)
    tenant: str = ""
    weight: float = 1.0
    deadline: float | None = None
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise Refused("the prompt is empty; it needs one token at least.")
        if not 0 < self.weight < float("inf"):
            raise Refused(f"weight was given as {self.weight}; a share of the machine is a positive number.")
        for name, weight in self.blend.items():
            if not -1000 < weight < 1000:
                raise Refused(f"adapter {name!r} was given the weight {weight}; a weight is a number, usually 0 to 1.")

    @property
    def payer(self) -> str:
        """The virtual counter that this request is charged to: its tenant's, or its blend's."""
        return self.tenant or "+".join(sorted(self.blend))


@dataclass(frozen=True)
class Token:
    """One step of an answer.

    Attributes:
        id: the token, or None for a last step that carries none (cancelled, timed out).
        logprob: log probability of the token under the model (after penalties, before temperature, top-k and top-p).
        top: the most probable (token, log probability) pairs, most probable first.
        finish: why the answer ends with this step, or None.
    """

    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None


@dataclass
class Usage:
    """What a request has cost so far; times in seconds since submission.

    Attributes:
        prompt: tokens of the prompt.
        cached: of these, how many were taken from the prefix cache.
        generated: tokens generated.
        started: when it left the queue, or None.
        first: when its first token was there, or None.
        total: when it ended, or None.
        overtaken: prompt and answer tokens of later arrivals that ran while it waited in the queue.
    """

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    started: float | None = None
    first: float | None = None
    total: float | None = None
    overtaken: int = 0


class Ticket:
    """What `submit` returns: the answer as it comes. Iterate it, in a thread or (`async for`) in an event loop, once.

    A consumer that leaves early should call `cancel`; the engine then frees the request's memory at its next step. A slow
    consumer slows nobody: steps wait here.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.usage = Usage(prompt=len(request.prompt))
        self.submitted = time.monotonic()
        self.cancelled = False
        self._steps: list[Token] = []
        self._read = 0
        self._failure: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []
        self._listeners: list[Callable[[], None]] = []

    # -- the engine's side ---------------------------------------------------------------------------------------------
    def put(self, step: Token) -> None:
        """Append a step; one with `finish` is the last."""
        with self._changed:
            if self._ended:
                return
            elapsed = time.monotonic() - self.submitted
            if step.id is not None:
                self.usage.generated += 1
                if self.usage.first is None:
                    self.usage.first = elapsed
            if step.finish is not None:
                self.usage.total, self._ended = elapsed, True
            self._steps.append(step)
            self._tell()

    def fail(self, failure: BaseException) -> None:
        """End with an error, which is raised where the ticket is read, after the steps that came before it."""
        with self._changed:
            if self._ended:
                return
            self._failure, self._ended = failure, True
            self.usage.total = time.monotonic() - self.submitted
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    # -- the client's side ---------------------------------------------------------------------------------------------
    def cancel(self) -> None:
        """Ask the engine to stop; the last step then says "cancelled". Does nothing where the answer has ended."""
        self.cancelled = True

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` in the engine's thread whenever a step (or the end) has come; it must be quick. `take` reads."""
        with self._changed:
            self._listeners.append(listener)
            if self._steps or self._ended:
                listener()

    def take(self) -> list[Token]:
        """The steps that are there and have not been read; [] where there are none yet. Raises the failure after them."""
        with self._changed:
            steps = self._steps[self._read :]
            if not steps and self._failure is not None:
                raise self._failure
            self._read += len(steps)
            return steps

    @property
    def ended(self) -> bool:
        """Whether the last step (or a failure) is there, read or not."""
        return self._ended

    def _next(self) -> Token | None:
        """The next unread step; None where there is none yet. Raises what ended it, StopIteration after the last."""
        if self._read < len(self._steps):
            self._read += 1
            return self._steps[self._read - 1]
        if self._failure is not None:
            raise self._failure
        if self._ended:
            raise StopIteration
        return None

    def __iter__(self) -> Iterator[Token]:
        while True:
            with self._changed:
                try:
                    while (step := self._next()) is None:
                        self._changed.wait()
                except StopIteration:
                    return
            yield step

    async def __aiter__(self) -> AsyncIterator[Token]:
        loop = asyncio.get_running_loop()
        while True:
            waked = asyncio.Event()

            def wake(event: asyncio.Event = waked) -> None:
                loop.call_soon_threadsafe(event.set)

            with self._changed:
                try:
                    step = self._next()
                except StopIteration:
                    return
                if step is None:
                    self._callbacks.append(wake)
            if step is None:
                await waked.wait()
            else:
                yield step

    def result(self, timeout: float | None = None) -> list[Token]:
        """All steps of the answer; waits for the end. Raises the failure, or TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"request {self.request.id} has not ended after {timeout} s.")
            if self._failure is not None:
                raise self._failure
            return list(self._steps)

    def tokens(self, timeout: float | None = None) -> list[int]:
        """The answer's token ids; waits for the end."""
        return [step.id for step in self.result(timeout) if step.id is not None]


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of the store as the engine sees it.

    Attributes:
        name: what requests call it.
        state: where it is.
        reason: why it is refused, or "".
        pinned: stays in memory once it is there.
        method: "lora", "dora", … ("" until it has been read).
        how: how its method is served: "form" (exactly), "svd" (a low-rank stand-in), with the error in `error`.
        error: relative Frobenius error of the stand-in, the largest over its layers; 0 for "form".
        rank: the largest rank of its layers; 0 until it has been read.
        bytes: memory that it takes while resident; 0 elsewhere.
        content: hash of its files as they were read; "" until then.
        using: requests that run or wait with it now.
        requests: requests ever submitted for it.
        hits: of these, how many found it in memory.
        loads: times that it was read.
        evictions: times that it was dropped to make room.
    """

    name: str
    state: State
    reason: str = ""
    pinned: bool = False
    method: str = ""
    how: str = ""
    error: float = 0.0
    rank: int = 0
    bytes: int = 0
    content: str = ""
    using: int = 0
    requests: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0


@dataclass(frozen=True)
class Stats:
    """Counters and levels of an engine at one moment (counters only grow; bytes are memory).

    Attributes:
        running: requests in the batch.
        waiting: requests in the queue.
        loading: of these, how many wait for their adapter.
        limit: requests that the queue holds before it answers `Overloaded`.
        steps: forwards run.
        prompt_tokens: prompt tokens computed.
        cached_tokens: prompt tokens taken from the prefix cache.
        generated_tokens: tokens generated.
        finished: why requests ended -> how many; "error" counts failures.
        refused: requests turned away at submission: "overloaded", "unknown", "refused" -> how many.
        cache_bytes: key and value memory in use by requests.
        cache_limit: all key and value memory.
        adapter_bytes: memory of resident adapters.
        adapter_limit: their budget.
        adapters: state -> how many adapters.
        hits: submissions whose adapters were all in memory.
        misses: submissions that had to wait for one.
        loads: adapters read from disk.
        evictions: adapters dropped to make room.
        counters: payer -> virtual tokens, the least of the active ones being 0.
        failure: what ended the engine's loop, or "".
    """

    running: int = 0
    waiting: int = 0
    loading: int = 0
    limit: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    cache_bytes: int = 0
    cache_limit: int = 0
    adapter_bytes: int = 0
    adapter_limit: int = 0
    adapters: Mapping[str, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


@runtime_checkable
class Adapters(Protocol):
    """The adapters of an engine. All methods may be called from any thread; those that wait say so.

    An unknown name raises UnknownAdapter; an adapter that cannot be used raises Refused with the reason.
    """

    def names(self) -> Sequence[str]:
        """All names in the store, sorted, whatever their state."""

    def info(self, name: str) -> AdapterInfo:
        """One adapter."""

    def all(self) -> Sequence[AdapterInfo]:
        """Every adapter, sorted by name."""

    def scan(self) -> Sequence[str]:
        """Look at the store again: new folders become known, vanished ones leave; returns the names now known."""

    def load(self, name: str) -> AdapterInfo:
        """Bring an adapter into memory; waits until it is there."""

    def unload(self, name: str) -> AdapterInfo:
        """Let an adapter go: new requests read it anew, running ones keep it till they end. Returns at once."""

    def pin(self, name: str) -> AdapterInfo:
        """Bring an adapter into memory and keep it there; waits."""

    def unpin(self, name: str) -> AdapterInfo:
        """Let a pinned adapter be dropped again when room is needed."""

    def reload(self, name: str) -> AdapterInfo:
        """Read the files again; running requests finish with what they began with, new ones get the new. Waits."""


@runtime_checkable
class Engine(Protocol):
    """What stands behind the HTTP front."""

    @property
    def adapters(self) -> Adapters:
        """The adapters that requests may name."""

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that one request may have."""

    def start(self) -> None:
        """Begin to serve; returns when requests can be submitted."""

    def drain(self, timeout: float | None = None) -> bool:
        """Accept nothing more and wait until every accepted request has ended; False after `timeout` seconds."""

    def stop(self) -> None:
        """End now; requests that have not ended fail with `Failed`. May be called twice."""

    def submit(self, request: Request) -> Ticket:
        """Accept a request, or raise Overloaded, UnknownAdapter or Refused. Never waits."""

    def stats(self) -> Stats:
        """A snapshot of the counters."""

    def ready(self) -> bool:
        """Whether `submit` would be answered: started, not draining, the loop alive."""
