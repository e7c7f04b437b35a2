"""An engine in another process, behind the contract: tickets here, tokens from there, in an event loop of its own thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Coroutine
from typing import Any, Literal

from lorakit.errors import LorakitError
from lorakit.serve.lifecycle import Lifecycle
from lorakit.serve.remote.folders import Folders
from lorakit.serve.request import Failed, Finish, Overloaded, Refused, Request, Stats, Ticket, Token, TooLong

log = logging.getLogger("lorakit.serve")


class RemoteEngine(Lifecycle):
    """What a vLLM engine and a cluster share.

    Args:
        folders: the store.
        context: tokens of prompt and answer together.
        limit: requests at once, beyond which it is Overloaded.
    """

    LOOKS = 0.05
    """Seconds between two looks at which clients have left and which deadlines have passed."""

    def __init__(self, folders: Folders, context: int, limit: int) -> None:
        super().__init__()
        self.folders, self._context, self.limit = folders, context, limit
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lorakit-remote", daemon=True)
        self._live: dict[Ticket, asyncio.Task[None]] = {}
        self._prompt_tokens = self._generated_tokens = self._pending = 0

    # -- for subclasses --------------------------------------------------------------------------------------------------
    async def _open(self) -> None:
        """Connect, in the loop."""
        return

    @abstractmethod
    async def _answer(self, ticket: Ticket) -> None:
        """Put every step of an answer into its ticket, the last with its reason. A cancelled task has to stop the work."""

    async def _close(self) -> None:
        """Disconnect, in the loop."""
        return

    # -- the contract ----------------------------------------------------------------------------------------------------
    @property
    def adapters(self) -> Folders:
        """The adapters that requests may name."""
        return self.folders

    def start(self) -> None:
        """Connect; returns when requests can be submitted."""
        self._thread.start()
        self._run(self._open())
        self._loop.call_soon_threadsafe(self._look)
        self._state = "ready"

    def _accept(self, request: Request) -> Ticket:
        if not self.ready():
            raise Overloaded("the engine is starting or shutting down.", 5.0)
        total = len(request.prompt) + request.sampling.max_tokens
        if total > self._context:
            raise TooLong(f"prompt and answer have {total} tokens; this model reads {self._context}.")
        if request.constraint is not None:
            raise Refused("answers of a given form need lorakit's own engine in one process.", "response_format")
        for name in request.blend:
            self.folders.info(name)
        with self._lock:
            if self._pending >= self.limit:
                raise Overloaded(f"{self._pending} requests are waiting or running; {self.limit} are the most.", 2.0)
            self._pending += 1
        ticket = Ticket(request)
        self.folders.count(request.blend, requests=1, using=1)
        self._loop.call_soon_threadsafe(self._begin, ticket)
        return ticket

    def _unended(self) -> bool:
        return self._pending > 0

    def stop(self) -> None:
        """End now."""
        with self._lock:
            if self._state in ("stopped", "new"):
                self._state = "stopped"
                return
            self._state = "stopped"
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def stats(self) -> Stats:
        """What passed through here."""
        with self._lock:
            infos = self.folders.all()
            return Stats(
                running=self._pending,
                limit=self.limit,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                finished=dict(self._finished),
                refused=dict(self._refused),
                adapters=dict(Counter(info.state for info in infos)),
                loads=sum(info.loads for info in infos),
            )

    # -- the loop's side -------------------------------------------------------------------------------------------------
    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _begin(self, ticket: Ticket) -> None:
        self._live[ticket] = self._loop.create_task(self._through(ticket))

    async def _through(self, ticket: Ticket) -> None:
        """One answer from its beginning to its end, whatever that is; no ticket is left without one."""
        kind: Finish | Literal["error", "done"] = "error"
        try:
            await self._answer(ticket)
            kind = "done"
        except asyncio.CancelledError:
            if self._state == "stopped":
                ticket.fail(Failed("the engine was stopped before this request had ended."))
            else:
                kind = "cancelled" if ticket.cancelled else "timeout"
                ticket.put(Token(None, finish=kind))
        except LorakitError as problem:
            ticket.fail(problem)
        except Exception as problem:
            log.exception("serve: request %s failed", ticket.request.id)
            ticket.fail(Failed(f"the engine failed at this request: {str(problem) or type(problem).__name__}"))
        finally:
            ticket.fail(Failed("the engine ended this request without a reason."))  # does nothing where it has ended
            self.folders.count(ticket.request.blend, using=-1)
            self._live.pop(ticket, None)
            with self._lock:
                self._finished[kind] += 1
                self._prompt_tokens += ticket.usage.prompt
                self._generated_tokens += ticket.usage.generated
                self._pending -= 1
                self._lock.notify_all()

    def _look(self) -> None:
        """Cancel the tasks of clients that have left and of deadlines that have passed."""
        now = time.monotonic()
        for ticket, task in self._live.items():
            deadline = ticket.request.deadline
            if ticket.cancelled or (deadline is not None and now - ticket.submitted > deadline):
                task.cancel()
        if self._state != "stopped":
            self._loop.call_later(self.LOOKS, self._look)

    async def _end(self) -> None:
        tasks = list(self._live.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close()
