"""An engine without a model, for tests of what stands in front of one: it keeps the whole contract, and its answers are a
function of prompt, blend and sampling that a test can compute itself."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorakit.serve.request import (
    AdapterInfo,
    Failed,
    Overloaded,
    Refused,
    Request,
    Stats,
    Ticket,
    Token,
    UnknownAdapter,
)

END = 0
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that characters come in pieces; 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": END, **{one: index + 1 for index, one in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


Answer = Callable[[Request], Sequence[int]]


def echo_of(request: Request) -> list[int]:
    """The answer of a request: tokens that depend on its prompt, its blend, and its seed; no end token among them."""
    key = repr((request.prompt, sorted(request.blend.items()), request.sampling.seed))
    letters = hashlib.sha256(key.encode()).digest() * (request.sampling.max_tokens // 32 + 1)
    return [66 + one % 26 for one in letters[: request.sampling.max_tokens]]


class StubAdapters:
    """A store that is a dictionary."""

    def __init__(self, names: Sequence[str], bad: Mapping[str, str]) -> None:
        self.known = {name: AdapterInfo(name, "on disk") for name in names}
        self.bad = dict(bad)
        self.new: list[str] = []
        self.known |= {name: AdapterInfo(name, "on disk") for name in bad}

    def names(self) -> Sequence[str]:
        return sorted(self.known)

    def info(self, name: str) -> AdapterInfo:
        if name not in self.known:
            raise UnknownAdapter(f"no adapter {name!r}")
        return self.known[name]

    def all(self) -> Sequence[AdapterInfo]:
        return [self.known[name] for name in self.names()]

    def scan(self) -> Sequence[str]:
        self.known |= {name: AdapterInfo(name, "on disk") for name in self.new}
        return self.names()

    def _set(self, name: str, **values: Any) -> AdapterInfo:
        self.known[name] = replace(self.info(name), **values)
        return self.known[name]

    def load(self, name: str) -> AdapterInfo:
        if name in self.bad:
            self._set(name, state="refused", reason=self.bad[name])
            raise Refused(self.bad[name])
        info = self.info(name)
        if info.state in ("resident", "pinned"):
            return info
        return self._set(name, state="resident", rank=8, bytes=1000, content="c0ffee", loads=info.loads + 1)

    def unload(self, name: str) -> AdapterInfo:
        return self._set(name, state="on disk", bytes=0, pinned=False)

    def pin(self, name: str) -> AdapterInfo:
        self.load(name)
        return self._set(name, state="pinned", pinned=True)

    def unpin(self, name: str) -> AdapterInfo:
        return self._set(name, state="resident", pinned=False)

    def reload(self, name: str) -> AdapterInfo:
        self.unload(name)
        return self.load(name)


class StubEngine:
    """Answers in its own thread, one token of every running request a step, `pause` seconds apart.

    Attributes:
        answer: request -> token ids of its answer; END ends one early.
        limit: requests at once, beyond which it is Overloaded.
        held: while set, nothing is generated.
        tickets: everything that was submitted.
    """

    def __init__(
        self, names: Sequence[str] = ("sql", "law"), bad: Mapping[str, str] = {}, context: int = 512, pause: float = 0.0
    ) -> None:
        self.adapters = StubAdapters(names, bad)
        self.context, self.pause, self.limit = context, pause, 64
        self.answer: Answer = echo_of
        self.tickets: list[Ticket] = []
        self.fails = self.failure = ""
        self.held = threading.Event()
        self._running: list[tuple[Ticket, list[int]]] = []
        self._changed = threading.Condition()
        self._state = "new"
        self._finished: dict[str, int] = {}

    def start(self) -> None:
        self._state = "ready"
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        return self._state == "ready"

    def submit(self, request: Request) -> Ticket:
        if not self.ready() or len(self._running) >= self.limit:
            raise Overloaded("the queue is full", 3.0)
        for name in request.blend:
            self.adapters.info(name)
        ticket = Ticket(request)
        self.tickets.append(ticket)
        with self._changed:
            self._running.append((ticket, list(self.answer(request))))
            self._changed.notify_all()
        return ticket

    def _loop(self) -> None:
        while self._state != "stopped":
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._state == "stopped", 0.05)
            while self.held.is_set() and self._state != "stopped":
                with self._changed:
                    self._running = [one for one in self._running if not self._ends(*one, step=False)]
                time.sleep(0.002)
            with self._changed:
                self._running = [one for one in self._running if not self._ends(*one)]
            if self.pause:
                time.sleep(self.pause)

    def _ends(self, ticket: Ticket, left: list[int], step: bool = True) -> bool:
        """Give a ticket its next token; whether that was the last."""
        for name in ticket.request.blend:
            if name in self.adapters.bad:
                ticket.fail(Refused(self.adapters.bad[name]))
                return True
        if self.fails:
            ticket.fail(Failed(self.fails))
            return True
        passed = time.monotonic() - ticket.submitted
        if ticket.cancelled or passed > (ticket.request.deadline or 1e9):
            ticket.put(Token(None, finish="cancelled" if ticket.cancelled else "timeout"))
            return True
        if not step:
            return False
        if ticket.usage.started is None:
            ticket.usage.started = passed
        token = left.pop(0)
        wanted = ticket.request.sampling.logprobs
        top = tuple((66 + rank, -1.0 - rank) for rank in range(wanted or 0))
        ends = token == END or token in ticket.request.sampling.stop_token_ids
        finish = "stop" if ends else "length" if not left else None
        ticket.put(Token(token, None if wanted is None else -0.5, top, finish))
        return finish is not None

    def drain(self, timeout: float | None = None) -> bool:
        self._state = "draining"
        until = time.monotonic() + (60 if timeout is None else timeout)
        while self._running and time.monotonic() < until:
            time.sleep(0.005)
        return not self._running

    def stop(self) -> None:
        self._state = "stopped"
        for ticket, _ in self._running:
            ticket.fail(Failed("the engine was stopped"))

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            limit=self.limit,
            generated_tokens=sum(ticket.usage.generated for ticket in self.tickets),
            loads=sum(info.loads for info in self.adapters.all()),
            adapters={"on disk": len(self.adapters.known)},
            finished={"stop": 0},
        )
