"""Who runs next: fair between payers, in order within each, with a bound on how far anybody can be overtaken.

Every payer (a tenant, or else a blend of adapters) has a virtual counter: prompt tokens computed, plus twice the tokens
generated, divided by its weight. Among the heads of the payers' queues the one with the least counter is admitted first. A
payer that comes (back) starts at the least counter of those who are active, so idleness saves nothing up.

**The bound.** A request waits (1) for earlier requests of its own payer; (2) when the batch is full, until the first of the
running requests ends; (3) for other payers only while their counters are below its own, so by at most what its own payer has
used since it came, and one request each; (4) where its pages or its adapter find no room, while at most `Limits.overtake`
tokens of later admissions pass it: then nobody else is admitted until it is. For an adapter that is still being read
nobody waits but the requests that need it.

A running request is sent back only if the pages run out, the latest admitted first: it goes to the head of its payer's queue
and keeps what it has generated; the oldest always finishes.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lorakit.serve.engine.pool import Lease
from lorakit.serve.engine.sampling import Chooser
from lorakit.serve.model.alone import Alone
from lorakit.serve.model.cache import PAGE, Cache, next_key, page_count, root_key
from lorakit.serve.model.packed import PackedAdapter
from lorakit.serve.request import Overloaded, PromptToken, Ticket

PROMPT_PRICE, ANSWER_PRICE = 1.0, 2.0
"""Virtual tokens of a token: a generated one takes a forward of its own."""


@dataclass(frozen=True)
class Limits:
    """How much an engine takes on.

    Attributes:
        batch: requests that run at once.
        step_tokens: tokens of one forward; longer prompts are cut into chunks of what running answers leave.
        queue: requests that wait at most. Beyond it, only payers with less than their share of the queue are let in.
        overtake: tokens of later requests that may be admitted past one that finds no room.
        cache_bytes: memory for keys and values.
        adapter_bytes: memory for adapters.
        context: tokens of prompt and answer together; None is what the model was made for.
    """

    batch: int = 32
    step_tokens: int = 512
    queue: int = 1024
    overtake: int = 4096
    cache_bytes: int = 2 << 30
    adapter_bytes: int = 2 << 30
    context: int | None = None


Blend = Sequence[tuple[PackedAdapter, float]]
"""Adapters and their weights."""


@dataclass(eq=False)
class Job:
    """One accepted request on its way.

    Attributes:
        ticket: what its client holds.
        chooser: how its tokens are chosen; holds the answer so far.
        leases: its adapters and their weights.
        tokens: prompt and answer.
        number: its place among all that were ever queued.
        computed: how many of these have keys and values in `pages`.
        blend: the adapters as they were when it was first admitted; it ends with what it began with.
        keys: of its full pages, as far as they are published.
        scores: of its prompt from the second token on, where its log probabilities are asked for.
        passed: tokens admitted past it while it found no room.
        stages: (position, the adapters that act from there on), ascending from 0: more than one where an adapter waits for
            its invocation.
        before: tokens that an adapter puts before the prompt; they are in `tokens`, with negative ids.
        chosen: adapter -> the positions at which its changes act, where these are not all.
        cache: of a row that is computed by itself (`model/alone.py`): its keys and values, once it runs.
    """

    ticket: Ticket
    chooser: Chooser
    leases: Sequence[tuple[Lease, float]]
    tokens: list[int] = field(init=False)
    number: int = -1
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    blend: Blend | None = None
    root: bytes = b""
    keys: list[bytes] = field(default_factory=list)
    scores: list[PromptToken] = field(default_factory=list)
    passed: int = 0
    stages: list[tuple[int, Blend]] = field(default_factory=list)
    before: int = 0
    chosen: dict[PackedAdapter, frozenset[int]] = field(default_factory=dict)
    cache: Any = None

    def __post_init__(self) -> None:
        self.tokens = list(self.ticket.request.prompt)

    def begin(self, blend: Blend) -> str:
        """The adapters are there; returns why they cannot answer this prompt, or ""."""
        self.blend, self.stages = blend, [(0, blend)]
        edited = [(adapter, adapter.around, weight) for adapter, weight in blend if adapter.around is not None]
        fronts = [(adapter.name, own.tokens, weight) for adapter, own, weight in edited if own.tokens]
        if len(fronts) > 1 or any(weight != 1 for *_, weight in fronts):
            names = " and ".join(repr(name) for name, *_ in fronts)
            return f"adapter {names} puts tokens before the prompt, so that a request has one such adapter, by the weight 1."
        scaled = [adapter.name for adapter, own, _ in edited if own.gains]
        if scaled and len(blend) > 1:
            return f"adapter {scaled[0]!r} scales inputs, which others of a blend would see; ask for it alone."
        gated = [adapter.name for adapter, own, _ in edited if own.gated]
        if gated and any(adapter.layers for adapter, _ in blend):
            return (
                f"the tokens of adapter {gated[0]!r} go through the layers' own matrices, which another adapter of this blend "
                "changes; ask for it without that one."
            )
        self.before = sum(tokens for _, tokens, _ in fronts)
        self.tokens = [*range(-self.before, 0), *self.tokens]
        for adapter, own, _ in edited:
            places = own.chosen(self.before, len(self.ticket.request.prompt))
            if places is not None:
                self.chosen[adapter] = places
        if any(adapter.invocation for adapter, _ in blend):
            starts = [adapter.start(self.ticket.request.prompt) for adapter, _ in blend]
            if None in starts:
                name, ids = next(
                    (one.name, one.invocation) for (one, _), at in zip(blend, starts, strict=True) if at is None
                )
                return (
                    f"adapter {name!r} acts from its invocation on, the tokens {', '.join(map(str, ids))}, and the prompt does "
                    "not hold them; add the text that they are, or ask the base model."
                )
            known = [
                (cast(int, at) + self.before if entry[0].invocation else 0, entry)
                for at, entry in zip(starts, blend, strict=True)
            ]
            self.stages = [
                (place, [entry for at, entry in known if at <= place])
                for place in sorted({0, *(at for at, _ in known)})
            ]
        return ""

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int, Blend]]:
        """(first token, end, adapters) of each part of these tokens that has adapters of its own."""
        ends = [place for place, _ in self.stages[1:]] + [first + count]
        for (start, blend), end in zip(self.stages, ends, strict=True):
            if max(start, first) < min(end, first + count):
                yield max(start, first), min(end, first + count), blend

    def root_key(self) -> bytes:
        """The key before the first page: of the adapters that act from the first token on."""
        writers = ((adapter.content, weight) for adapter, weight in self.stages[0][1])
        return root_key(writers, self.ticket.request.domain)

    def page_key(self, page: int) -> str:
        """What the key of a page holds beyond its tokens and the pages before it: the adapters that begin to act later."""
        if len(self.stages) == 1 and not self.chosen:
            return ""
        acting = {
            id(adapter): start - page * PAGE for start, blend in reversed(self.stages[1:]) for adapter, _ in blend
        }
        own = [
            (adapter.content, weight, max(0, acting[id(adapter)]))
            for adapter, weight in self.blend or ()
            if acting.get(id(adapter), PAGE) < PAGE
        ]
        first = page * PAGE
        at = [
            (adapter.content, [place - first for place in sorted(places) if first <= place < first + PAGE])
            for adapter, places in self.chosen.items()
        ]
        return repr((sorted(own), sorted(at))) if own or any(places for _, places in at) else ""

    @property
    def alone(self) -> tuple[Alone, float] | None:
        """What computes this row where it takes no part in the batch, and its weight."""
        for adapter, weight in self.blend or ():
            if adapter.alone is not None:
                return adapter.alone, weight
        return None

    @property
    def payer(self) -> str:
        return self.ticket.request.payer

    @property
    def scoring(self) -> bool:
        """Whether log probabilities of its prompt are still to be found."""
        request = self.ticket.request
        return request.sampling.prompt_logprobs is not None and len(self.scores) < len(request.prompt) - 1

    @property
    def unscored(self) -> int:
        """The first of its tokens whose logits are still to be read for the prompt's sake."""
        return self.before + len(self.scores)

    def scored_prompt(self) -> tuple[PromptToken, ...]:
        """Its prompt with the log probabilities that were asked for; () where none were."""
        request = self.ticket.request
        return () if request.sampling.prompt_logprobs is None else (PromptToken(request.prompt[0]), *self.scores)

    @property
    def limit(self) -> int:
        """Tokens of prompt and answer at most."""
        return self.asked + self.ticket.request.sampling.max_tokens

    @property
    def asked(self) -> int:
        """Tokens of the prompt, and of what an adapter puts before it."""
        return self.before + len(self.ticket.request.prompt)

    def deadline(self) -> float:
        """When it times out, on the monotonic clock."""
        seconds = self.ticket.request.deadline
        return float("inf") if seconds is None else self.ticket.submitted + seconds


@dataclass(frozen=True)
class Share:
    """What one job computes in a step: `count` tokens from `job.computed` on."""

    job: Job
    count: int

    @property
    def ends(self) -> bool:
        """Whether it reaches the job's last token, so that the next one is chosen."""
        return self.job.computed + self.count == len(self.job.tokens)

    @property
    def rows(self) -> int:
        """How many of its last tokens' logits are wanted."""
        if self.job.scoring:
            return max(0, self.job.computed + self.count - max(self.job.computed, self.job.unscored))
        return int(self.ends)


class Scheduler:
    """The queues, the batch, and the counters. Used by the engine's thread; `check` may be called from any.

    Args:
        limits: how much to take on.
        cache: the pages.
        rows: tokens of prompts whose logits one step may hold.
    """

    def __init__(self, limits: Limits, cache: Cache, rows: int = 1 << 30) -> None:
        self.limits, self.cache, self.rows = limits, cache, rows
        self.waiting: dict[str, deque[Job]] = {}
        self.running: list[Job] = []
        self.counters: dict[str, float] = {}
        self._numbers = itertools.count()

    # -- coming and going ----------------------------------------------------------------------------------------------
    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return sum(map(len, self.waiting.values()))

    def check(self, payer: str, pending: int, own: int, rate: float) -> None:
        """Raise Overloaded where the queue has no place for one more request of this payer.

        Args:
            payer: who asks.
            pending: requests accepted and not yet in a queue, of all payers.
            own: of these, this payer's.
            rate: tokens per second that the engine makes at present.
        """
        total = self.queued + pending
        if total < self.limits.queue:
            return
        queues = dict(self.waiting)
        mine = own + len(queues.get(payer, ()))
        if mine < self.limits.queue // (len(queues) + 1):
            return
        ahead = sum(job.limit - job.computed for queue in queues.values() for job in list(queue))
        raise Overloaded(
            f"{total} requests wait, {mine} of them for {payer or 'the base model'}; the queue holds {self.limits.queue}.",
            retry_after=round(min(max(ahead / max(rate, 1.0), 1.0), 60.0), 1),
        )

    def add(self, job: Job) -> None:
        """Put an accepted request at the end of its payer's queue."""
        job.number = next(self._numbers)
        if job.payer not in self.active():
            least = min((self.counters[payer] for payer in self.active()), default=0.0)
            self.counters[job.payer] = max(self.counters.get(job.payer, 0.0), least)
        self.waiting.setdefault(job.payer, deque()).append(job)

    def active(self) -> set[str]:
        """Payers with anything waiting or running."""
        return {*self.waiting, *(job.payer for job in self.running)}

    def jobs(self) -> Iterator[Job]:
        """All jobs, those that run first."""
        yield from list(self.running)
        for queue in list(self.waiting.values()):
            yield from list(queue)

    def remove(self, job: Job) -> None:
        """A job has ended, in whatever way."""
        self._release(job)
        if job in self.running:
            self.running.remove(job)
        elif job.payer in self.waiting:
            queue = self.waiting[job.payer]
            if job in queue:
                queue.remove(job)
            if not queue:
                del self.waiting[job.payer]
        active = self.active()
        if not active:
            self.counters.clear()
        elif len(self.counters) > 4 * len(active) + 64:  # payers that are long gone
            least = min(self.counters[payer] for payer in active)
            self.counters = {p: c for p, c in self.counters.items() if p in active or c > least}

    def _release(self, job: Job) -> None:
        self.cache.give_back(job.pages)
        job.pages, job.keys, job.computed, job.cache = [], [], 0, None

    # -- admission -----------------------------------------------------------------------------------------------------
    def heads(self) -> list[Job]:
        """The first job of each payer, the one to be admitted first at the front."""
        return sorted(
            (queue[0] for queue in self.waiting.values()), key=lambda job: (self.counters[job.payer], job.number)
        )

    def admit(self, place: Callable[[Job], bool | None]) -> None:
        """Move jobs from the queues into the batch while there is room.

        Args:
            place: brings a job's adapters into place: True where they are, False where they find no room now, None where
                they are being read.
        """
        while len(self.running) < self.limits.batch:
            skipped: list[Job] = []
            for job in self.heads():
                placed = place(job)
                if placed and self._take_pages(job):
                    self._enter(job, skipped)
                    break
                if placed is not None:
                    if job.passed >= self.limits.overtake:
                        return  # everybody else waits until it is in
                    skipped.append(job)
            else:
                return

    def _take_pages(self, job: Job) -> bool:
        """Find the pages that are there already, and take those for the rest of its tokens and one more."""
        job.root = job.root_key()
        shared, keys = self.cache.find(job.root, job.tokens, job.page_key) if job.alone is None else ([], [])
        if job.scoring:  # a cached page has no logits
            del shared[job.unscored // PAGE :], keys[job.unscored // PAGE :]
        fresh = page_count(len(job.tokens) + 1) - len(shared)
        # Each running job will soon want a page more; a margin saves sending one back at once.
        margin = len(self.running) if self.running else 0
        if fresh + self.cache.idle(shared) + margin > self.cache.available:
            return False
        self.cache.share(shared)
        job.pages = [*shared, *self.cache.take(fresh)]
        job.keys, job.computed = keys, len(shared) * PAGE
        return True

    def _enter(self, job: Job, skipped: Sequence[Job]) -> None:
        queue = self.waiting[job.payer]
        queue.popleft()
        if not queue:
            del self.waiting[job.payer]
        self.running.append(job)
        usage = job.ticket.usage
        if usage.started is None:
            usage.started, usage.cached = time.monotonic() - job.ticket.submitted, max(0, job.computed - job.before)
        cost = job.limit - job.computed
        for other in skipped:
            other.passed += cost
        for waiting in self.waiting.values():
            if waiting[0].number < job.number:
                waiting[0].ticket.usage.overtaken += cost

    # -- a step --------------------------------------------------------------------------------------------------------
    def plan(self) -> list[Share]:
        """What each running job computes in the next step: one token of every answer, and chunks of prompts."""
        shares = []
        rows = self.rows
        left = self.limits.step_tokens - sum(len(job.tokens) - job.computed == 1 for job in self.running)
        for job in list(self.running):
            if job not in self.running:
                continue  # sent back just now
            missing = len(job.tokens) - job.computed
            # a row by itself is not cut: what it looks for in its prompt may stand anywhere
            count = missing if missing == 1 or job.alone else min(missing, max(left, 0))
            if job.scoring and not job.alone:
                count = min(count, max(0, job.unscored - job.computed) + rows)
            if count and self._grow(job, job.computed + count):
                shares.append(Share(job, count))
                rows -= shares[-1].rows if job.scoring else 0
                left -= count if missing > 1 else 0
        return [share for share in shares if share.job in self.running]

    def _grow(self, job: Job, tokens: int) -> bool:
        """Give a job pages for this many tokens; False where it had to go back itself."""
        need = page_count(tokens) - len(job.pages)
        while need > self.cache.available:
            last = self.running[-1]
            self._send_back(last)
            if last is job:
                return False
        if need > 0:
            job.pages += self.cache.take(need)
        return True

    def _send_back(self, job: Job) -> None:
        self._release(job)
        self.running.remove(job)
        self.waiting.setdefault(job.payer, deque()).appendleft(job)

    def done(self, share: Share) -> None:
        """A share is computed: charge for it, and publish the pages that it filled."""
        job = share.job
        generated = share.count == 1 and job.computed >= job.asked
        price = ANSWER_PRICE if generated else PROMPT_PRICE
        self.counters[job.payer] += share.count * price / job.ticket.request.weight
        job.computed += share.count
        if not self.cache.reuse or job.alone:
            return
        while (len(job.keys) + 1) * PAGE <= job.computed:
            number = len(job.keys)
            before = job.keys[-1] if job.keys else job.root
            job.keys.append(next_key(before, job.tokens[number * PAGE : (number + 1) * PAGE], job.page_key(number)))
            self.cache.publish(job.pages[number], job.keys[-1])
