"""What all endpoints share: the engine, the tokenizer, the tenants, the limits; and the way of a request to the engine."""

from __future__ import annotations

import logging
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import HTTPConnection

from lorakit.errors import LorakitError
from lorakit.files.prompt import Prompter, Prompts
from lorakit.serve.grammar import Grammars
from lorakit.serve.http.aliases import Aliases
from lorakit.serve.http.bodies import ChatRequest, CompletionRequest, Generation
from lorakit.serve.http.faults import Fault, too_long
from lorakit.serve.http.metrics import Metrics
from lorakit.serve.http.tenants import ANYONE, Tenant, Tenants
from lorakit.serve.http.text import TokenTexts
from lorakit.serve.limits import check_files, without_path
from lorakit.serve.request import AdapterInfo, Constraint, Engine, Request, Sampling, Ticket, UnknownAdapter

log = logging.getLogger("lorakit")


class Named(Protocol):
    """A body that names a model."""

    @property
    def model(self) -> str:
        """The base model's name, or an adapter's."""


NOTHING = 1e-6
"""A blend whose weights add up to less is the base model."""

ESTIMATE = 1024
"""Tokens of an answer that a quota sets aside where the request does not limit it."""

SCORES = 250_000
"""Log probabilities of prompts in one answer: some 10 MB of it."""


@dataclass(frozen=True)
class Bounds:
    """What one HTTP request may cost.

    Attributes:
        body: bytes of a request body.
        prompt: tokens of a prompt; None: what the model reads.
        output: tokens of an answer; None: what the model's window leaves.
        answers: answers of one request, prompts × n.
        seconds: until an answer must have ended.
        upload: seconds until the headers, and then the body, must be there.
        stall: seconds that a client may leave a piece of its stream unread.
    """

    body: int = 2**20
    prompt: int | None = None
    output: int | None = None
    answers: int = 32
    seconds: float = 600.0
    upload: float = 20.0
    stall: float = 30.0


TOKENIZERS = 8
"""Tokenizers for which grammars are kept: the base's, and those that adapters bring."""


@dataclass
class Front:
    """One server.

    Attributes:
        engine: what generates.
        tokenizer: of the base model.
        name: what requests call the base model; "base" does as well.
        also: further names of the base model, such as its full name on the hub.
        tenants: who may ask.
        bounds: what a request may cost.
        admin: whether the admin endpoints are there. They are not where anyone may ask from another machine.
        store: the folder of adapter folders, each of which may bring its own prompt.
        hosts: names under which requests may call this server; empty is any.
        metrics: what is counted.
        clock: seconds, for quotas.
    """

    engine: Engine
    tokenizer: Any
    name: str = "base"
    tenants: Tenants = field(default_factory=Tenants)
    bounds: Bounds = Bounds()
    admin: bool = True
    hosts: frozenset[str] = frozenset()
    metrics: Metrics = field(default_factory=Metrics)
    clock: Callable[[], float] = time.monotonic
    store: Path | None = None
    also: frozenset[str] = frozenset()
    created: int = field(default_factory=lambda: int(time.time()))
    _scanned: float = -1e9

    SCANS = 2.0
    """Seconds between two looks at the store for a name that is not known."""

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.tokenizer, check_files)
        self.token_texts = TokenTexts(self.tokenizer)
        self.aliases = Aliases()
        self._grammars: dict[int, Grammars] = {}
        self._grammars_lock = threading.Lock()
        self.metrics.watch(self.engine)
        self.reserved = frozenset({self.name, "base", *self.also})
        self._said: set[str] = set()
        self._say_reserved(self.engine.adapters.names())

    # -- names -----------------------------------------------------------------------------------------------------------
    def blend(self, asked: Named, tenant: Tenant) -> dict[str, float]:
        """The adapters that a request names, each known to the store and allowed to the tenant.

        A name is only ever compared with those of the store: it is no path, no URL and no hub name. One that is not there
        and one that is not allowed get the same answer, so that nobody learns the names of others.
        """
        base = asked.model in self.reserved
        param, adapters = self._named(asked, tenant) if isinstance(asked, Generation) else ("", None)
        if adapters is not None:
            if not base:
                raise Fault(
                    400,
                    f'{param} names its adapters itself, so model is the base ("{self.name}"); it was "{asked.model}".',
                    "blend_over_adapter",
                    "model",
                )
            for name in adapters:
                self._known(name, tenant, f"{param}.{name}" if param == "adapters" else param)
            # what leaves the base as it is asks for the base, and needs the right to it
            if sum(map(abs, adapters.values())) < NOTHING and not tenant.base:
                raise self._absent(asked.model, tenant, param)
            return {name: weight for name, weight in adapters.items() if weight}
        if asked.model == "default" and tenant.default:
            self._known(tenant.default, tenant, "model")
            return {tenant.default: 1.0}
        if base:
            if not tenant.base:
                raise self._absent(asked.model, tenant, "model")
            return {}
        who = (asked.user if isinstance(asked, Generation) else None) or tenant.name
        name = self.aliases.find(asked.model, who) or asked.model
        if not tenant.may_use(name):  # the answer is the same whether the name is an alias or nothing
            raise self._absent(asked.model, tenant, "model")
        self._known(name, tenant, "model")
        return {name: 1.0}

    def _named(self, asked: Generation, tenant: Tenant) -> tuple[str, dict[str, float] | None]:
        """The parameter by which a request names adapters beside `model`, and their weights; None where there is none."""
        for param in ("lora_path", "adapter_id"):
            if (name := getattr(asked, param)) is not None:
                return param, {name: 1.0}
        if asked.lora is None:
            return "adapters", asked.adapters
        names: dict[int, list[str]] = {}
        for name in self.allowed(tenant):
            names.setdefault(number_of(name), []).append(name)
        blend: dict[str, float] = {}
        for one in asked.lora:
            found = names.get(one.id, [])
            if len(found) != 1:
                raise Fault(
                    404,
                    f"this key has no adapter with the id {one.id}; GET /lora-adapters lists them.",
                    "model_not_found",
                    "lora",
                )
            blend[found[0]] = blend.get(found[0], 0.0) + one.scale
        return "lora", blend

    def prompter(self, blend: Mapping[str, float], chat: bool) -> Prompter:
        """How these adapters are asked.

        Raises:
            Fault: a conversation for a blend of adapters that are asked in different ways.
            LorakitError: the files of a prompt cannot be read.
        """
        found: list[Prompter] = []
        for name in blend if self.store is not None else ():
            folder = self.store / name  # type: ignore[operator]
            try:
                one = self.prompts.of(folder)
            except LorakitError as problem:
                adapters = self.engine.adapters
                if adapters.info(name).state != "refused":
                    with suppress(
                        LorakitError
                    ):  # so that the store knows it as unusable, and /v1/models offers it no more
                        adapters.load(name)
                said = without_path(str(problem), folder)
                raise Fault(400, f"adapter {name!r}: {said}", "refused", "model") from problem
            if not any(one.prompt.same_form(other.prompt) for other in found):
                found.append(one)
        if len(found) < 2:
            return found[0] if found else self.prompts.base
        if chat:
            raise Fault(
                400,
                f"the adapters of this blend ({', '.join(blend)}) were trained with different chat templates; write the prompt "
                "yourself and send it to /v1/completions.",
                "prompts_differ",
                "adapters",
            )
        return self.prompts.base

    def allowed(self, tenant: Tenant) -> list[str]:
        """The names of all adapters that a tenant may use."""
        return [name for name in self.engine.adapters.names() if tenant.may_use(name) and name not in self.reserved]

    def usable(self, tenant: Tenant) -> list[AdapterInfo]:
        """Of these, the ones that have not turned out to be unusable."""
        allowed = set(self.allowed(tenant))
        return [info for info in self.engine.adapters.all() if info.name in allowed and info.state != "refused"]

    def refused(self, tenant: Tenant) -> dict[str, str]:
        """Of these, the ones that have, and why."""
        allowed = set(self.allowed(tenant))
        return {
            one.name: one.reason for one in self.engine.adapters.all() if one.name in allowed and one.state == "refused"
        }

    def scan(self) -> bool:
        """Look for new folders in the store, unless that was done a moment ago; whether it was done now."""
        if self.clock() - self._scanned < self.SCANS:
            return False
        self._scanned = self.clock()
        self._say_reserved(self.engine.adapters.scan())
        return True

    def _say_reserved(self, names: Sequence[str]) -> None:
        """An adapter that is named like the base can never be asked for; said once for each."""
        for name in sorted({*names} & self.reserved - self._said):
            log.warning(
                "serve: the adapter %s is not served: requests call the base model so. Give its folder another name, or "
                "the base (--name).",
                name,
            )
            self._said.add(name)

    def _known(self, name: str, tenant: Tenant, param: str) -> None:
        if not tenant.may_use(name):
            raise self._absent(name, tenant, param)
        try:
            self.engine.adapters.info(name)
        except UnknownAdapter:
            raise self._absent(name, tenant, param) from None

    def _absent(self, name: str, tenant: Tenant, param: str) -> Fault:
        known = [*([self.name] if tenant.base else []), *self.allowed(tenant)]
        shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        return Fault(404, f'this key has no model "{name}"; its models: {shown}.', "model_not_found", param)

    # -- submitting --------------------------------------------------------------------------------------------------------
    def submit(
        self,
        asked: ChatRequest | CompletionRequest,
        tenant: Tenant,
        blend: Mapping[str, float],
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        key: str,
        prompter: Prompter,
        constraint: Constraint | None = None,
    ) -> Order:
        """Hand every answer of a request to the engine, all of them or none.

        Raises:
            Fault, LorakitError: a quota, a limit, or the engine stands against it.
        """
        answers = len(prompts) * asked.choices
        ledger = self.tenants.ledger(tenant)
        written = sum(map(len, prompts)) * asked.choices
        # what is asked for; where nothing is said, an estimate, and the rest is paid at the end
        reserved = asked.choices * sum(
            one.max_tokens if asked.limit is not None else min(one.max_tokens, ESTIMATE) for one in sampling
        )
        ledger.enter(tenant, answers, written + reserved, self.clock())
        order = Order(self, tenant, dict(blend), key, answers, prompter, reserved=reserved)
        domain = "" if self.tenants.open else "shared" if tenant.cache == "shared" else f"tenant {tenant.name}"
        try:
            for number in range(answers):
                row, choice = divmod(number, asked.choices)
                how = sampling[row]
                request = Request(
                    id=f"{key}-{number}",
                    prompt=tuple(prompts[row]),
                    blend=blend,
                    tenant="" if self.tenants.open else tenant.name,
                    weight=tenant.weight,
                    deadline=self.bounds.seconds,
                    domain=f"{domain}\0{asked.cache_salt or ''}",
                    sampling=how if how.seed is None else replace(how, seed=(how.seed + choice) % 2**63),
                    constraint=constraint,
                )
                order.tickets.append(self.engine.submit(request))
        except BaseException:
            order.close()
            raise
        return order

    def constraint(self, asked: ChatRequest | CompletionRequest, prompter: Prompter) -> Constraint | None:
        """What the answers must keep to, compiled; takes milliseconds, for the first one a second.

        Raises:
            Refused: it cannot be enforced.
        """
        if asked.form is None:
            return None
        with self._grammars_lock:
            key = id(prompter.tokenizer)  # which lives as long as its entry
            known = self._grammars.pop(key, None) or Grammars(prompter.tokenizer)
            self._grammars[key] = known
            if len(self._grammars) > TOKENIZERS:
                self._grammars.pop(next(iter(self._grammars)))
        return known.find(asked.form)

    def check_count(self, asked: ChatRequest | CompletionRequest) -> None:
        """Refuse too many answers before time is spent on any.

        Raises:
            Fault: prompts × n are more than one request may ask for.
        """
        answers = asked.prompt_count * asked.choices
        if answers > self.bounds.answers:
            raise Fault(
                400,
                f"{asked.prompt_count} prompts with n={asked.choices} ask for {answers} answers; {self.bounds.answers} in one "
                "request are the most.",
                "too_many_answers",
                "prompt" if asked.choices == 1 else "n" if asked.choices == asked.n else "best_of",
            )

    def sampling(
        self, asked: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], prompter: Prompter
    ) -> list[Sampling]:
        """How to answer each prompt, held to the limits.

        Raises:
            Fault: a prompt or an answer that does not fit.
        """
        bounds = self.bounds
        if asked.limit is not None and bounds.output is not None and asked.limit > bounds.output:
            raise Fault(
                400,
                f"max_tokens was given as {asked.limit}; this server gives {bounds.output} at most.",
                "max_tokens_exceeded",
                "max_tokens",
            )
        given: dict[str, Any] = {one.name: getattr(asked, one.name, None) for one in fields(Sampling)}
        given |= {
            "logit_bias": {int(token): number for token, number in (asked.logit_bias or {}).items()},
            "stop_token_ids": tuple(asked.stop_token_ids or ()),
            "top_k": max(0, asked.top_k or 0),
            "seed": None if asked.seed is None else asked.seed % 2**63,
            "logprobs": asked.reported,
            "prompt_logprobs": asked.scored,
        }
        if asked.scored is not None:
            self._check_scores(sum(map(len, prompts)) * asked.choices * (asked.scored + 1))
        for param in ("logit_bias", "stop_token_ids"):
            for token in given[param]:
                if token >= len(self.tokenizer):
                    raise Fault(
                        400,
                        f"{param} names the token {token}; this model has {len(self.tokenizer)} tokens.",
                        "unknown_token",
                        param,
                    )
        if not asked.ignore_eos:
            given["stop_token_ids"] += tuple(prompter.stop_ids)
        given = {name: value for name, value in given.items() if value is not None}
        return [Sampling(**given | {"max_tokens": self._room(len(prompt), asked.limit)}) for prompt in prompts]

    def _room(self, prompt: int, limit: int | None) -> int:
        """Tokens of the answer at most, to a prompt of this many.

        Raises:
            Fault: the prompt, or `limit` tokens more, do not fit into the model.
        """
        window, bounds = self.engine.context, self.bounds
        most, room = min(window - (limit != 0), bounds.prompt or window), window - prompt
        if not prompt:
            raise Fault(400, "the prompt is empty; it needs one token at least.", "empty_prompt", "prompt")
        if prompt > most:
            raise too_long(
                f"the prompt has {prompt:,} tokens; {most:,} are the most (the model reads {window:,}, its answer included).",
                "prompt",
            )
        if limit is not None and limit > room:
            raise too_long(
                f"the prompt has {prompt:,} tokens and max_tokens asks for {limit:,} more; this model reads {window:,}, its "
                "answer included.",
                "max_tokens",
            )
        return min(room, bounds.output or room) if limit is None else limit

    def _check_scores(self, numbers: int) -> None:
        if numbers > SCORES:
            raise Fault(
                400,
                f"{numbers:,} log probabilities of prompts are asked for, those of the most probable tokens included; "
                f"{SCORES:,} in one request are the most.",
                "too_many_logprobs",
                "prompt",
            )

    def fingerprint(self, blend: Mapping[str, float]) -> str:
        """Which weights answered: the content of the adapters, as far as it has been read."""
        parts = []
        for name in sorted(blend):
            try:
                parts.append(self.engine.adapters.info(name).content[:12])
            except LorakitError:
                parts.append("")
        return "-".join(["fp", *parts]) if parts else "fp-base"


@dataclass
class Order:
    """The answers of one HTTP request while they are made. Closed in every case, once, when the request is over."""

    front: Front
    tenant: Tenant
    blend: dict[str, float]
    key: str
    answers: int
    prompter: Prompter
    tickets: list[Ticket] = field(default_factory=list)
    closed: bool = False
    reserved: int = 0

    def cancel(self) -> None:
        """Stop what has not ended."""
        for ticket in self.tickets:
            if not ticket.ended:
                ticket.cancel()

    def close(self) -> None:
        """Settle the tenant's account and the metrics; whatever still runs is cancelled."""
        if self.closed:
            return
        self.closed = True
        self.cancel()
        generated = sum(ticket.usage.generated for ticket in self.tickets)
        self.front.tenants.ledger(self.tenant).leave(
            self.tenant, self.answers, generated - self.reserved, self.front.clock()
        )
        ledger = self.front.tenants.ledger(self.tenant)
        ledger.used.update(
            requests=1,
            answers=self.answers,
            prompt_tokens=sum(ticket.usage.prompt for ticket in self.tickets),
            cached_tokens=sum(ticket.usage.cached for ticket in self.tickets),
            completion_tokens=generated,
        )
        self.front.metrics.finished(self.blend, self.tickets)

    def note(self) -> dict[str, Any]:
        """What the log says of it."""
        usages = [ticket.usage for ticket in self.tickets]
        firsts = [one.first for one in usages if one.first is not None]
        return {
            "adapters": self.blend,
            "answers": len(self.tickets),
            "prompt_tokens": sum(one.prompt for one in usages),
            "cached_tokens": sum(one.cached for one in usages),
            "generated_tokens": sum(one.generated for one in usages),
            "first_token_seconds": round(min(firsts), 4) if firsts else None,
        }


def number_of(name: str) -> int:
    """llama.cpp's id of an adapter: there its place in a list, here a number of its name, which no other adapter changes."""
    return zlib.crc32(name.encode())


def front_of(request: HTTPConnection) -> Front:
    """What the application of this request serves."""
    front: Front = request.app.state.front
    return front


def tenant_of(request: HTTPConnection) -> Tenant:
    """Who asks, as the guard has found."""
    return getattr(request.state, "tenant", None) or ANYONE


def new_key(kind: str) -> str:
    """An id for a request, unique among all."""
    return f"{kind}-{uuid.uuid4().hex}"


def unfinished(reason: str | None) -> Fault:
    """The error for an answer that ended without having been finished."""
    if reason == "timeout":
        return Fault(
            504,
            "the answer was not finished in the time that this server gives; ask for fewer tokens.",
            "timeout",
            headers={"x-should-retry": "false"},
        )
    return Fault(503, "the answer was cancelled before it was finished; the server may be shutting down.", "cancelled")
