"""Replicas of an engine on Ray Serve, behind the same contract: the front stays one, what generates is many.

A request goes to a replica that holds its adapter, if one does and has room (Ray's multiplexed routing), else to the less busy
of two. Where a replica dies, its requests continue on another: what has been generated becomes part of the prompt, which is the
same answer for greedy and for unseeded sampling without penalties; other requests that had begun fail, and say so.

Tenants, quotas and names are the front's, so that they hold for the cluster as a whole. The replicas see the same store
under the same path. Without RAY_ADDRESS a cluster of this machine alone is started, on the loopback.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.serve.remote.folders import Folders
from lorakit.serve.remote.remote_engine import RemoteEngine
from lorakit.serve.request import AdapterInfo, Failed, Request, Stats, Ticket, Token, arrivals

try:
    ray: Any = importlib.import_module("ray")
    serve: Any = importlib.import_module("ray.serve")
except ModuleNotFoundError as missing:
    raise LorakitError(
        f'serve: --cluster needs Ray ({missing.name} is not installed): pip install "lorakit[cluster]".'
    ) from missing

log = logging.getLogger("lorakit.serve")

NAME = "lorakit"
ATTEMPTS = 4
"""Replicas that a request may lose before it is given up."""


class Replica:
    """One engine in a process of Ray's."""

    def __init__(self, base: str, store: str | None, dtype: str, formless: str, limits: Mapping[str, Any]) -> None:
        from lorakit.models.loading import load_model
        from lorakit.serve.engine.engine import LocalEngine
        from lorakit.serve.engine.scheduler import Limits

        model, _ = load_model(base, dtype=dtype)
        self.engine = LocalEngine(model, store, Limits(**limits), formless=formless)  # type: ignore[arg-type]
        self.engine.start()

    @serve.multiplexed(max_num_models_per_replica=256)  # type: ignore[untyped-decorator]
    async def has_adapter(self, adapter: str) -> str:
        """Tells the router that this replica has had this adapter; the engine's pool reads and keeps it."""
        return adapter

    async def generate(self, request: Request) -> AsyncIterator[tuple[Any, ...]]:
        """The steps of an answer, as many together as there are at the moment; an error as data."""
        ticket: Ticket | None = None
        try:
            for name in request.blend:
                await self.has_adapter(name)
            ticket = self.engine.submit(request)
            async for _, tokens in arrivals([ticket]):
                yield "steps", tokens, ticket.usage.cached
        except LorakitError as refusal:
            yield "refused", refusal  # raised here it would change its type on its way between processes
        finally:
            if ticket is not None:
                ticket.cancel()

    def describe(self) -> dict[str, Any]:
        """What the front has to know."""
        return {"context": self.engine.context, "process": os.getpid(), "stats": self.engine.stats()}

    def command(self, verb: str, name: str) -> tuple[str, Any]:
        """Do something with an adapter of this replica."""
        try:
            self.engine.adapters.scan()
            return "done", getattr(self.engine.adapters, verb)(name)
        except LorakitError as refusal:
            return "refused", refusal

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if not self.engine.ready():
            raise RuntimeError(self.engine.stats().failure or "the engine is not running")


class ClusterEngine(RemoteEngine):
    """`Engine` of the contract over replicas.

    Args:
        base: the base model, as every replica can load it.
        store: the adapters, at the same path everywhere.
        replicas: how many at least.
        most: how many at most; between the two Ray follows the number of requests. None: always `replicas`.
        dtype, formless, limits: of every engine.
    """

    def __init__(
        self,
        base: str,
        store: Path | None,
        replicas: int,
        *,
        most: int | None = None,
        dtype: str = "auto",
        formless: str = "alone",
        limits: Mapping[str, Any],
    ) -> None:
        self.replicas, self.most = replicas, most or replicas
        self._arguments = (base, None if store is None else str(store), dtype, formless, dict(limits))
        self._batch = int(limits["batch"])
        self._handle: Any = None
        self._began_ray = False
        per_replica = self._batch + int(limits["queue"])
        super().__init__(Folders(store, self._prepare), 0, per_replica * self.most)

    def start(self) -> None:
        """Start Ray where it is not running, and the replicas; returns when they are ready."""
        if not ray.is_initialized():
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False)
            else:
                # Ray would have replicas behind everything else on the machine, even behind the front that waits for them.
                os.environ.setdefault("RAY_worker_niceness", "0")
                ray.init(
                    num_cpus=max(self.most, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    object_store_memory=128 * 2**20,
                    _node_ip_address="127.0.0.1",
                )
            self._began_ray = True
        serve.start(proxy_location="Disabled")  # the front is ours
        scaling: dict[str, Any] = {"num_replicas": self.replicas}
        if self.most > self.replicas:
            scaling = {
                "autoscaling_config": {
                    "min_replicas": self.replicas,
                    "max_replicas": self.most,
                    "target_ongoing_requests": self._batch,
                    # A replica is up in seconds, so that Ray's half a minute of watching would be most of the wait.
                    "upscale_delay_s": 5.0,
                    "look_back_period_s": 10.0,
                }
            }
        deployment = serve.deployment(
            name="replica",
            max_ongoing_requests=self._batch * 4,
            ray_actor_options={"num_cpus": 1},
            health_check_period_s=5,
            **scaling,
        )(Replica)
        self._handle = serve.run(deployment.bind(*self._arguments), name=NAME, route_prefix=None)
        self._context = int(self._handle.describe.remote().result()["context"])
        super().start()

    def stop(self) -> None:
        """End the replicas, and Ray where it was started here."""
        ends = self._state not in ("stopped", "new")
        super().stop()
        if ends:
            serve.shutdown()
            if self._began_ray:
                ray.shutdown()

    def stats(self) -> Stats:
        """What passed through the front."""
        return replace(super().stats(), adapters={"on disk": len(self.folders.names())})

    def _prepare(self, name: str, folder: Path) -> tuple[AdapterInfo, Path]:
        """Read an adapter in one replica, the one that its requests will prefer."""
        kind, value = self._handle.options(multiplexed_model_id=name).command.remote("load", name).result()
        if kind == "refused":
            raise value
        return value, folder

    async def _answer(self, ticket: Ticket) -> None:
        tokens: list[int] = []
        for attempt in range(ATTEMPTS):
            request = continued(ticket.request, tokens, attempt)
            if request is None:
                raise Failed(
                    f"the replica was lost after {len(tokens)} tokens, and another cannot continue this request: it is seeded "
                    "or has penalties. Ask again."
                )
            try:
                await self._stream(ticket, request, tokens)
                return
            except LorakitError:
                raise
            except Exception as lost:  # whatever Ray says of a replica that is gone
                log.warning("serve: request %s lost its replica: %s: %s", request.id, type(lost).__name__, lost)
                await asyncio.sleep(0.2 * attempt)
        raise Failed(f"{ATTEMPTS} replicas were lost at this request; the server's log says how.")

    async def _stream(self, ticket: Ticket, request: Request, tokens: list[int]) -> None:
        """Pass one replica's steps on."""
        adapter = next(iter(request.blend), None)
        options = {"stream": True} | ({"multiplexed_model_id": adapter} if adapter is not None else {})
        stream = self._handle.options(**options).generate.remote(request)
        ended = False
        try:
            async for kind, *rest in stream:
                if kind == "refused":
                    raise rest[0]
                steps: Sequence[Token]
                steps, ticket.usage.cached = rest
                if ticket.usage.started is None:
                    ticket.usage.started = 0.0
                for step in steps:
                    ticket.put(step)
                    if step.id is not None:
                        tokens.append(step.id)
                    ended = ended or step.finish is not None
            if not ended:
                raise ConnectionError("the replica ended the answer early")
        finally:
            if not ended:
                with suppress(Exception):
                    stream.cancel()


def continued(request: Request, tokens: Sequence[int], attempt: int) -> Request | None:
    """The request that continues after these tokens of its answer; None where that would give another answer."""
    how = request.sampling
    if not tokens:
        return replace(request, id=f"{request.id}-{attempt}") if attempt else request
    penalties = how.presence_penalty or how.frequency_penalty or how.repetition_penalty != 1.0
    if penalties or (how.seed is not None and how.temperature > 0):
        return None
    return replace(
        request,
        id=f"{request.id}-{attempt}",
        prompt=(*request.prompt, *tokens),
        sampling=replace(
            how,
            max_tokens=how.max_tokens - len(tokens),
            min_tokens=max(0, how.min_tokens - len(tokens)),
            prompt_logprobs=None,
        ),
    )
