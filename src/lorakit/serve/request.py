"""What a client asks of an engine and what it gets back: the contract between the engine and everything in front of it.

HTTP, tenants, metrics and the cluster are written against this file alone; any object that keeps `Engine` can stand behind
them. Token ids go in and come out; text, chat templates, stop strings and JSON are the front's.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_type_hints, runtime_checkable

from lorakit.errors import LorakitError

Finish = Literal["stop", "length", "cancelled", "timeout"]
"""Why a request ended: an end-of-text token, its limit, its client, its deadline. A failure raises."""

State = Literal["on disk", "loading", "resident", "pinned", "draining", "refused"]
"""Where an adapter is: known only, being read, in memory, in memory for good, leaving when its requests end, unusable."""


class Refused(LorakitError):  # noqa: N818 - named by what is wrong
    """A request or an adapter that this engine will not serve; `reason` says why and what would work (HTTP 400), `param` which
    part of the request is meant."""

    def __init__(self, reason: str, param: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.param = reason, param


class UnknownAdapter(Refused):
    """A request names an adapter that the engine's store does not hold (HTTP 404)."""


class TooLong(Refused):
    """Prompt and answer together do not fit into the model's context or the engine's memory (HTTP 400)."""


class Overloaded(LorakitError):  # noqa: N818 - named by what is wrong
    """The queue is full or the engine is draining; the same request may succeed in `retry_after` seconds (HTTP 429)."""

    def __init__(self, reason: str, retry_after: float = 1.0) -> None:  # the default is for unpickling
        super().__init__(reason)
        self.retry_after = retry_after


class Failed(LorakitError):  # noqa: N818 - named by what is wrong
    """The engine could not finish a request that it had accepted; raised where the ticket is read (HTTP 500)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop; the names are OpenAI's and vLLM's.

    Attributes:
        max_tokens: generated tokens at most.
        temperature: divides the logits; 0 is greedy.
        top_p: only the most probable tokens whose probabilities add up to this are drawn from.
        top_k: only this many of the most probable tokens are drawn from; 0 is all.
        min_p: only tokens at least this share as probable as the most probable one are drawn from.
        seed: makes the draws repeatable, whatever else is in the batch; None draws anew.
        stop_token_ids: token ids that end the answer, as the model's own end-of-text ids do.
        min_tokens: no such id is chosen before this many tokens.
        ignore_eos: continue after the model's own end-of-text ids (for measurements).
        logit_bias: token -> number added to its logit.
        presence_penalty: taken once off the logit of every token that was generated.
        frequency_penalty: taken off the logit of a generated token as often as it was.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and answer; 1 is none.
        logprobs: how many of the most probable tokens to report with each chosen one; None reports no probabilities.
        prompt_logprobs: how many of them to report with each token of the prompt; None reports no probabilities. With it
            `max_tokens` may be 0.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "max_tokens": (1, inf), "temperature": (0, 100), "top_p": (1e-6, 1), "top_k": (0, inf), "min_p": (0, 1),
        "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100), "logprobs": (0, 100),
        "prompt_logprobs": (0, 100),
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name, (low, high) in {**self.RANGES, **self._bounds}.items():
            value = getattr(self, name)
            if not (value is None or low <= value <= high):  # also refuses nan
                raise Refused(f"{name} was given as {value}; expected a number from {low} to {high}.", name)
        for token, number in self.logit_bias.items():
            if not -1000 <= number <= 1000:
                raise Refused(
                    f"logit_bias of token {token} was given as {number}; expected a number from -1000 to 1000.",
                    "logit_bias",
                )

    @property
    def _bounds(self) -> dict[str, tuple[float, float]]:
        """The ranges that depend on other fields."""
        return {
            "max_tokens": (1 if self.prompt_logprobs is None else 0, inf),
            "min_tokens": (0, self.max_tokens),
        }


class Constraint(Protocol):
    """What an answer must keep to, and how far it has come: `serve/grammar.py` has one."""

    def copy(self) -> Constraint:
        """The same at its present state, to go on by itself."""

    def allowed(self, width: int, ends: frozenset[int]) -> Any:
        """Which tokens may follow: booleans (width,) of NumPy. `ends` may where the answer may end."""

    def accept(self, token: int) -> None:
        """A token that was chosen, none of the ends."""

    @property
    def ended(self) -> bool:
        """Whether nothing may follow any more."""

    @property
    def problem(self) -> str:
        """What went wrong with it, or ""."""


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
        domain: requests of one domain share the pages of equal beginnings; those of another never do, so that nobody learns
            from an answer's time what another has asked.
        sampling: how to choose tokens.
        constraint: what the answer must keep to, at its beginning, or None.
    """

    id: str
    prompt: tuple[int, ...]
    blend: Mapping[str, float] = field(default_factory=dict)
    tenant: str = ""
    weight: float = 1.0
    deadline: float | None = None
    domain: str = ""
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise Refused("the prompt is empty; it needs one token at least.", "prompt")
        if not 0 < self.weight < float("inf"):
            raise Refused(f"weight was given as {self.weight}; a share of the machine is a positive number.")
        for name, weight in self.blend.items():
            if not -1000 < weight < 1000:
                raise Refused(
                    f"adapter {name!r} was given the weight {weight}; a weight is a number, usually 0 to 1.",
                    f"adapters.{name}",
                )

    @property
    def payer(self) -> str:
        """The virtual counter that this request is charged to: its tenant's, or its blend's."""
        return self.tenant or "+".join(sorted(self.blend))


@dataclass(frozen=True)
class PromptToken:
    """One token of a prompt, under the model as it is: before temperature, penalties and every bias.

    Attributes:
        id: the token.
        logprob: its log probability after the tokens before it; None for the first.
        rank: its place among all tokens, 1 for the most probable; None for the first.
        top: the most probable (token, log probability) pairs, most probable first.
    """

    id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Token:
    """One step of an answer.

    Attributes:
        id: the token, or None for a last step that carries none (cancelled, timed out).
        logprob: log probability of the token under the model (after penalties, before temperature, top-k and top-p).
        top: the most probable (token, log probability) pairs, most probable first.
        finish: why the answer ends with this step, or None.
        prompt: with the first step, every token of the prompt, where its log probabilities were asked for.
    """

    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    prompt: tuple[PromptToken, ...] = ()


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
            self._wake()

    def fail(self, failure: BaseException) -> None:
        """End with an error, which is raised where the ticket is read, after the steps that came before it."""
        with self._changed:
            if self._ended:
                return
            self._failure, self._ended = failure, True
            self.usage.total = time.monotonic() - self.submitted
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

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

    def __iter__(self) -> Iterator[Token]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._read < len(self._steps))
                steps = self.take()
            if not steps:
                return
            yield from steps

    async def __aiter__(self) -> AsyncIterator[Token]:
        async for _, steps in arrivals([self]):
            for step in steps:
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


async def arrivals(
    tickets: Sequence[Ticket], unended: set[int] | None = None
) -> AsyncIterator[tuple[int, list[Token]]]:
    """The steps of several tickets as they come, as many together as there are, each time with the ticket's place.

    Whoever reads may take a place out of `unended`, and its ticket is read no further. Raises a ticket's failure after the
    steps that came before it.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:  # in the engine's thread, which may outlive the loop
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(arrived.set)

    for ticket in tickets:
        ticket.listen(wake)
    unended = set(range(len(tickets))) if unended is None else unended
    while unended:
        await arrived.wait()
        arrived.clear()
        for place in sorted(unended):
            # until nothing is left: a failure is raised after the steps before it
            while place in unended and (steps := tickets[place].take()):
                if steps[-1].finish is not None:
                    unended.discard(place)
                yield place, steps


@dataclass(frozen=True)
class About:
    """What a number of `AdapterInfo` or `Stats` means, for the API's description and for metrics.

    Attributes:
        text: in one line.
        kind: "counter" (it only grows) or "gauge"; "" for what is no metric.
        label: for a number per key, what the keys are.
    """

    text: str
    kind: Literal["", "counter", "gauge"] = ""
    label: str = ""


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of the store as the engine sees it."""

    name: Annotated[str, About("what requests call it")]
    state: Annotated[State, About("where it is")]
    reason: Annotated[str, About("why it is refused, or computed by itself")] = ""
    pinned: Annotated[bool, About("stays in memory once it is there")] = False
    method: Annotated[str, About('"lora", "dora", …; "" until it has been read')] = ""
    how: Annotated[
        str, About('"form", "dense" (as ΔW), "svd" (a low-rank stand-in), "alone" (by a forward of its own)')
    ] = ""
    error: Annotated[float, About("relative Frobenius error of a stand-in, the largest over its layers")] = 0.0
    rank: Annotated[int, About("the largest rank of its layers; 0 until it has been read")] = 0
    bytes: Annotated[int, About("memory that it takes", "gauge")] = 0
    content: Annotated[str, About('hash of its files as they were read; "" until then')] = ""
    using: Annotated[int, About("requests that run or wait with it now")] = 0
    requests: Annotated[int, About("requests ever submitted for it")] = 0
    hits: Annotated[int, About("requests that found it in memory", "counter")] = 0
    loads: Annotated[int, About("times that it was read", "counter")] = 0
    evictions: Annotated[int, About("times that it was dropped to make room", "counter")] = 0
    faults: Annotated[int, About("answers that ended because its numbers were not finite", "counter")] = 0


def empty() -> Any:
    """A field that begins as an empty mapping."""
    return field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """Counters and levels of an engine at one moment."""

    running: Annotated[int, About("requests in the batch", "gauge")] = 0
    waiting: Annotated[int, About("requests in the queue", "gauge")] = 0
    loading: Annotated[int, About("requests in the queue that wait for their adapter", "gauge")] = 0
    limit: Annotated[int, About("requests that the queue holds before it answers `Overloaded`", "gauge")] = 0
    steps: Annotated[int, About("forwards of the model", "counter")] = 0
    prompt_tokens: Annotated[int, About("prompt tokens computed", "counter")] = 0
    cached_tokens: Annotated[int, About("prompt tokens taken from the prefix cache", "counter")] = 0
    generated_tokens: Annotated[int, About("tokens generated", "counter")] = 0
    finished: Annotated[Mapping[str, int], About('ended answers; "error" is a failure', "counter", "why")] = empty()
    refused: Annotated[Mapping[str, int], About("answers refused at submission", "counter", "why")] = empty()
    cache_bytes: Annotated[int, About("key and value memory in use by requests", "gauge")] = 0
    cache_limit: Annotated[int, About("key and value memory in all", "gauge")] = 0
    adapter_bytes: Annotated[int, About("memory of resident adapters", "gauge")] = 0
    adapter_limit: Annotated[int, About("the budget of resident adapters", "gauge")] = 0
    adapters: Annotated[Mapping[str, int], About("adapters of the store", "gauge", "state")] = empty()
    hits: Annotated[int, About("submissions whose adapters were all in memory", "counter")] = 0
    misses: Annotated[int, About("submissions that had to wait for an adapter", "counter")] = 0
    loads: Annotated[int, About("adapters read from disk", "counter")] = 0
    evictions: Annotated[int, About("adapters dropped to make room", "counter")] = 0
    counters: Annotated[Mapping[str, float], About("virtual tokens of each payer, the least active one having 0")] = (
        empty()
    )
    failure: Annotated[str, About("what ended the engine's loop")] = ""


def abouts(kind: type) -> dict[str, About]:
    """What every field of `AdapterInfo` or `Stats` means."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(kind, include_extras=True).items()}


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

    @property
    def failure(self) -> str:
        """Why it has given up for good, or "": what ends its process."""

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
