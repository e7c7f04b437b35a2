"""The engine: many requests, each with its own adapters, through one base model, a token at a time.

`LocalEngine.step` is the heart. Everything else that takes long (reading adapters, writing to clients) happens in
other threads. A forward that fails ends the requests that were in it, with the reason, and no others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.serve.engine.pool import Lease, Pool
from lorakit.serve.engine.sampling import Choice, Chooser, NoChoice, choose
from lorakit.serve.engine.scheduler import Blend, Job, Limits, Scheduler, Share
from lorakit.serve.engine.scores import rows_of, score
from lorakit.serve.lifecycle import Lifecycle
from lorakit.serve.model import native
from lorakit.serve.model.alone import Alone
from lorakit.serve.model.batch import Batch, Mixture, Run, assemble, mix
from lorakit.serve.model.cache import PAGE, Cache, page_bytes
from lorakit.serve.model.packed import AdapterReader, Formless
from lorakit.serve.model.serving_model import ServingModel
from lorakit.serve.request import (
    Constraint,
    Failed,
    Finish,
    Overloaded,
    PromptToken,
    Refused,
    Request,
    Stats,
    Ticket,
    Token,
    TooLong,
)

log = logging.getLogger("lorakit")

AHEAD = 8
"""Requests at the front of the queue whose adapters are read before there is a place in the batch for them."""

ATTEMPTS = 3
"""Forwards that may fail one after the other before the engine gives up."""


class LocalEngine(Lifecycle):
    """An engine over a model in this process; `Engine` of the contract.

    Args:
        model: a causal model of transformers, with its weights. It is not changed for good: `stop` gives it back.
        store: a folder whose folders are adapters; their names are what requests call them. None: the base alone.
        limits: how much to take on.
        formless: what becomes of adapters that no batch can share: "alone", "refuse", "dense" or "svd" (`Formless`).
        stand_in: with "svd", the rank of the stand-ins and the relative error allowed.
        readers: adapters that are read at once.
        compiled: use the compiled loops where they can be had.
        pack: keep bfloat16 weights a second time, ordered for the processor's matmuls.
        reuse: let requests share the pages of equal beginnings.

    Raises:
        Refused: the model cannot be served in batches; found out by trying.
    """

    def __init__(
        self,
        model: nn.Module,
        store: str | Path | None = None,
        limits: Limits | None = None,
        *,
        formless: Formless = "alone",
        stand_in: tuple[int, float] = (32, 0.1),
        readers: int = 2,
        compiled: bool = True,
        pack: bool = True,
        reuse: bool = True,
    ) -> None:
        super().__init__()
        self.limits = limits = limits or Limits()
        if not 0 < limits.batch <= limits.step_tokens:
            raise LorakitError(
                f"serve: batch={limits.batch} requests do not fit into steps of {limits.step_tokens} tokens; raise step_tokens."
            )
        adapter_readers = [AdapterReader(model, formless, *stand_in) for _ in range(readers)]
        self.model = ServingModel(model, compiled, pack)
        for reader in adapter_readers:
            reader.unfit = frozenset(self.model.unfit)
            reader.windows = any(one.window for one in self.model.context.asked.values())
        size = page_bytes(self.model.shapes, self.model.dtype)
        pages = limits.cache_bytes // size
        if pages < 2:
            raise LorakitError(
                f"serve: {limits.cache_bytes} bytes for the key-value cache cannot hold two pages of {size} bytes; raise "
                "cache_bytes (--cache)."
            )
        self.cache = Cache(self.model.shapes, pages, self.model.dtype, self.model.device, reuse)
        self.model.record(self.cache)
        self.pool = Pool(adapter_readers, None if store is None else Path(store), limits.adapter_bytes, self._wake)
        self._arrivals: deque[Job] = deque()
        self._thread: threading.Thread | None = None
        self._ids: set[str] = set()
        self._ends = _end_tokens(model)
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.scheduler = Scheduler(limits, self.cache, rows_of(self._vocabulary))
        self._context = min(limits.context or _context(model), self.cache.pages * PAGE)
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._rate = 0.0
        self._woken = False
        self._mixture: tuple[Sequence[Blend], Mixture | None] = ([], None)

    # -- the contract's side -------------------------------------------------------------------------------------------
    @property
    def adapters(self) -> Pool:
        """The adapters that requests may name."""
        return self.pool

    def start(self) -> None:
        """Begin to serve."""
        if self._state != "new":
            raise LorakitError("serve: this engine was started before; make a new one.")
        self._state = "ready"
        native.let_go()  # the engine's own thread computes from now on
        self.pool.start()
        self._thread = threading.Thread(target=self._serve, name="lorakit-engine", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether requests are taken."""
        return super().ready() and not self._failure

    def _unended(self) -> bool:
        return bool(self._ids)

    def stop(self) -> None:
        """End now."""
        with self._lock:
            if self._state == "stopped":
                return
            self._state = "stopped"
            self._lock.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            self._fail_all(Failed("the engine was stopped before this request had ended."))
        self.pool.stop()
        self.model.close()

    def stats(self) -> Stats:
        """A snapshot of the counters."""
        with self._lock:
            scheduler, pool = self.scheduler, self.pool
            active = scheduler.active()
            least = min((scheduler.counters[payer] for payer in active), default=0.0)
            heads = scheduler.heads()
            return Stats(
                running=len(scheduler.running),
                waiting=scheduler.queued + len(self._arrivals),
                loading=sum(any(lease.entry.loading for lease, _ in job.leases) for job in heads),
                limit=self.limits.queue,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                generated_tokens=self._generated_tokens,
                finished=dict(self._finished),
                refused=dict(self._refused),
                cache_bytes=self.cache.used * self.cache.page_bytes,
                cache_limit=self.cache.pages * self.cache.page_bytes,
                adapter_bytes=pool.bytes,
                adapter_limit=pool.budget,
                adapters=pool.counts(),
                hits=pool.hits,
                misses=pool.misses,
                loads=pool.loads,
                evictions=pool.evictions,
                counters={payer: scheduler.counters[payer] - least for payer in active},
                failure=self._failure,
            )

    def _accept(self, request: Request) -> Ticket:
        if self._failure:
            raise Failed(f"the engine has failed: {self._failure}")
        if self._state in ("draining", "stopped"):
            raise Overloaded("the engine is shutting down.", retry_after=5.0)
        wanted = len(request.prompt) + request.sampling.max_tokens
        if wanted > self._context:
            raise TooLong(
                f"the prompt has {len(request.prompt)} tokens and {request.sampling.max_tokens} more are asked for; prompt and "
                f"answer together have {self._context} at most.",
                "max_tokens",
            )
        if not all(0 <= token < self._vocabulary for token in request.prompt):
            raise Refused(f"the prompt holds a token id outside of 0 to {self._vocabulary - 1}.", "prompt")
        ends = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            ends |= self._ends
        ticket = Ticket(request)
        with self._lock:
            if request.id in self._ids:
                raise Refused(f"a request with the id {request.id!r} is under way already.")
            own = sum(job.payer == request.payer for job in self._arrivals)
            self.scheduler.check(request.payer, len(self._arrivals), own, self._rate)
            leases: list[tuple[Lease, float]] = []
            try:
                for name, weight in request.blend.items():
                    leases.append((self.pool.claim(name), weight))
            except Refused:
                for lease, _ in leases:
                    self.pool.release(lease)
                raise
            self._ids.add(request.id)
            own_state = None if request.constraint is None else request.constraint.copy()
            self._arrivals.append(
                Job(ticket, Chooser(request.sampling, request.prompt, ends, constraint=own_state), leases)
            )
            self._woken = True
            self._lock.notify_all()
        return ticket

    # -- the loop ------------------------------------------------------------------------------------------------------
    def _serve(self) -> None:
        failures = 0
        while self._state != "stopped":
            self._woken = False
            try:
                if self.step():
                    failures = 0
                    continue
                with self._lock:
                    if not self._woken and self._state != "stopped":
                        # With requests that only wait for an adapter, deadlines are looked at now and then.
                        self._lock.wait(0.02 if self._ids else None)
            except (
                Exception
            ) as problem:  # one bad step must not end everybody's service; rows' own faults do not come here
                failures += 1
                log.exception("serve: a step failed")
                with self._lock:
                    if failures >= ATTEMPTS:
                        self._failure = f"{failures} steps failed one after the other, the last with: {problem}"
                    for job in list(self.scheduler.running):
                        self._end(job, Failed(f"the forward failed: {str(problem) or type(problem).__name__}"))
                    if self._failure:
                        self._fail_all(Failed(self._failure))
                        return

    def step(self) -> bool:
        """One forward, if anything is there to run; whether there was. (The loop's body; tests call it without a thread.)"""
        begin = time.perf_counter()
        with self._lock:
            self._look_after()
            self._admit()
            shares: Sequence[Share] = self.scheduler.plan()
        if not shares:
            return False
        logits, shares = self._forward(shares)
        logits, scores = _scored(logits, shares)
        ending = [share for share in shares if share.ends and share.job.ticket.request.sampling.max_tokens]
        choices = choose(logits, [share.job.chooser for share in ending]) if ending else []
        with self._lock:
            self._deliver(shares, dict(zip((share.job for share in ending), choices, strict=True)), scores)
        tokens = sum(share.count for share in shares)
        self._rate += 0.05 * (tokens / (time.perf_counter() - begin) - self._rate)
        return True

    def _forward(self, shares: Sequence[Share]) -> tuple[Tensor, Sequence[Share]]:
        """The wanted logits of a step, and the shares that they are of, in their order; of a row that is computed by itself and
        fails, that row alone ends."""
        apart = [share for share in shares if share.job.alone]
        if not apart:
            return self.model.forward(self._batch(shares), self.cache), shares
        done = [share for share in shares if not share.job.alone]
        found = [self.model.forward(self._batch(done), self.cache)] if done else []
        for share in apart:
            try:
                found.append(self._by_itself(share))
                done.append(share)
            except Refused as refusal:
                with self._lock:
                    self._end(share.job, refusal)
            except Exception as problem:
                log.exception("serve: a row's own forward failed")
                with self._lock:
                    self._end(share.job, Failed(f"the forward failed: {str(problem) or type(problem).__name__}"))
        return torch.cat(found) if found else torch.empty(0), done

    def _by_itself(self, share: Share) -> Tensor:
        job = share.job
        assert job.alone is not None
        alone, weight = job.alone
        if share.rows > self.scheduler.rows:
            raise Refused(
                f"this adapter is computed by itself, a prompt in one piece, and {share.rows} log probabilities of the prompt "
                f"are asked for; {self.scheduler.rows} are the most.",
                "prompt",
            )
        job.cache = alone.cache() if job.cache is None else job.cache
        tokens = job.tokens[job.computed : job.computed + share.count]
        return alone.forward(tokens, job.cache, weight, share.rows).to(self.model.device)

    def _wake(self) -> None:
        """An adapter has come, or turned out to be unusable."""
        with self._lock:
            self._woken = True
            self._lock.notify_all()

    def _look_after(self) -> None:
        """Queue what has arrived; end what was cancelled or is overdue."""
        while self._arrivals:
            self.scheduler.add(self._arrivals.popleft())
        now = time.monotonic()
        everybody = not self.scheduler.running or self._steps % 8 == 0  # the queue may be long
        for job in list(self.scheduler.jobs() if everybody else self.scheduler.running):
            if job.ticket.cancelled:
                self._end(job, "cancelled")
            elif now > job.deadline():
                self._end(job, "timeout")

    def _admit(self) -> None:
        self.scheduler.admit(self._place)
        heads = self.scheduler.heads()[:AHEAD] if self.scheduler.waiting else []
        self.pool.fetch([[lease for lease, _ in job.leases] for job in heads])
        if not heads or self.scheduler.running or self.pool.reading or any(job.blend for job in heads):
            return
        # Nobody runs, nobody holds an adapter, none is being read: there will never be more room than now.
        first = heads[0]
        if self._place(first) is False:
            reason = (
                f"the adapters of request {first.ticket.request.id} find no room: the {self.pool.budget} bytes for adapters "
                "are taken by pinned ones. The operator can unpin some, or give adapters more memory (--memory)."
            )
            self._end(first, Refused(reason))

    def _place(self, job: Job) -> bool | None:
        """Bring a job's adapters into use; a job whose adapter is unusable ends here."""
        if job.blend is not None:
            return True
        try:
            placed = self.pool.place([lease for lease, _ in job.leases])
        except Refused as refusal:
            self._end(job, refusal)
            return None
        if placed:
            blend = [(lease.version.adapter, weight) for lease, weight in job.leases if lease.version is not None]
            if reason := job.begin(blend) or (job.alone and _obstacle(blend)):
                self._end(job, Refused(reason))
                return None
            if job.limit > self._context:
                self._end(
                    job,
                    TooLong(
                        f"prompt, answer and the {job.before} tokens of the adapter before them are {job.limit} tokens; "
                        f"{self._context} is the most.",
                        "max_tokens",
                    ),
                )
                return None
        return placed

    def _batch(self, shares: Sequence[Share]) -> Batch:
        runs = []
        for share in shares:
            job, begin = share.job, share.job.computed
            for first, end, blend in job.pieces(begin, share.count):
                wanted = min(end - first, max(0, end - (begin + share.count - share.rows)))
                runs.append(Run(job.tokens[first:end], first, job.pages, blend, wanted, job.chosen))
        blends = [run.blend for run in runs]
        known, mixture = self._mixture
        if len(known) != len(blends) or any(one is not other for one, other in zip(known, blends, strict=True)):
            mixture = mix(blends)
            self._mixture = blends, mixture
        return assemble(runs, self.model.device, mixture)

    def _deliver(
        self, shares: Sequence[Share], choices: dict[Job, Choice | NoChoice], scores: dict[Job, Scores]
    ) -> None:
        self._steps += 1
        for share in shares:
            job = share.job
            fresh = min(job.computed + share.count, job.asked) - job.computed
            self._prompt_tokens += max(fresh, 0)
            ends = share.ends
            self.scheduler.done(share)
            choice, scored = choices.get(job), scores.get(job, ())
            if isinstance(scored, NoChoice):
                choice = scored
            else:
                job.scores += scored
            if choice is None:
                if ends:  # nothing is to be generated
                    self._end(job, Token(None, finish="length", prompt=job.scored_prompt()))
                continue
            if isinstance(choice, NoChoice):
                self._end(job, self._fault(job, choice))
                continue
            self._generated_tokens += 1
            job.tokens.append(choice.token)
            job.chooser.answer.append(choice.token)
            finish: Finish | None = None
            if choice.token in job.chooser.ends:
                finish = "stop"
            elif len(job.tokens) >= job.limit:
                finish = "length"
            prompt = job.scored_prompt() if len(job.chooser.answer) == 1 else ()
            step = Token(choice.token, choice.logprob, choice.top, finish, prompt)
            if finish is None:
                job.ticket.put(step)
                if (constraint := job.chooser.constraint) is not None:
                    self._follow(job, constraint, choice.token)
            else:
                self._end(job, step)

    def _follow(self, job: Job, constraint: Constraint, token: int) -> None:
        """A token of an answer that keeps to a grammar: the answer ends where nothing may follow."""
        constraint.accept(token)
        if problem := constraint.problem:
            log.warning("serve: a grammar failed: %s", problem)
            self._end(job, Failed("the grammar of this request failed; this answer ends here."))
        elif constraint.ended:
            self._end(job, Token(None, finish="stop"))

    def _fault(self, job: Job, why: NoChoice) -> Failed:
        """What ends a request whose row gave no token; its adapters are told apart where the numbers are theirs."""
        names = [lease.entry.name for lease, _ in job.leases]
        if not why.finite:
            for lease, _ in job.leases:
                lease.entry.faults += 1
            log.warning("serve: %s %s", ", ".join(names) or "the base model", why.reason)
        kind = "adapter" if len(names) == 1 else "the blend of"
        who = f"{kind} {', '.join(map(repr, names))}" if names else "the base model"
        return Failed(f"{who} {why.reason}; this answer ends here.")

    def _end(self, job: Job, outcome: Token | Finish | LorakitError) -> None:
        """Let a job go: its pages, its adapters, its id; and tell its client."""
        self.scheduler.remove(job)
        self._cached_tokens += job.ticket.usage.cached
        for lease, _ in job.leases:
            self.pool.release(lease)
        self._mixture = [], None
        self._ids.discard(job.ticket.request.id)
        if isinstance(outcome, LorakitError):
            self._finished["error"] += 1
            job.ticket.fail(outcome)
        else:
            step = outcome if isinstance(outcome, Token) else Token(None, finish=outcome)
            self._finished[str(step.finish)] += 1
            job.ticket.put(step)
        self._lock.notify_all()

    def _fail_all(self, failure: Failed) -> None:
        for job in [*self.scheduler.jobs(), *self._arrivals]:
            self._end(job, failure)
        self._arrivals.clear()


Scores = Sequence[PromptToken] | NoChoice
"""What a step has found of a prompt's log probabilities."""


def _scored(logits: Tensor, shares: Sequence[Share]) -> tuple[Tensor, dict[Job, Scores]]:
    """The logits from which tokens are chosen, and the log probabilities of prompts that the others hold."""
    scores: dict[Job, Scores] = {}
    if all(share.job.ticket.request.sampling.prompt_logprobs is None for share in shares):
        return logits, scores
    first, last = 0, []
    for share in shares:
        job, end, how = share.job, share.job.computed + share.count, share.job.ticket.request.sampling
        if job.scoring:
            tokens = job.tokens[end - share.rows + 1 : min(end + 1, job.asked)]
            scores[job] = score(logits[first : first + len(tokens)], tokens, how.prompt_logprobs or 0)
        first += share.rows
        if share.ends and how.max_tokens:
            last.append(first - 1)
    return logits[last], scores


def _obstacle(blend: Blend) -> str:
    """Why no row can have this blend, one of whose adapters is computed by itself; "" where it can."""
    names = [adapter.name for adapter, _ in blend if adapter.alone is not None]
    if len(blend) > 1:
        return f"adapter {names[0]!r} is computed by itself and takes no part in a blend; ask for it alone."
    (adapter, weight), *_ = blend
    try:
        cast(Alone, adapter.alone).check(weight)
    except LorakitError as problem:
        return str(problem).replace("'served'", repr(adapter.name))
    return ""


def _end_tokens(model: nn.Module) -> frozenset[int]:
    """The model's own end-of-text ids."""
    ends: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            ends |= {ids} if isinstance(ids, int) else set(ids)
            break
    return frozenset(ends)


def _context(model: nn.Module) -> int:
    """Tokens that the model was made for."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)
