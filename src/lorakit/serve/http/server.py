"""The process that serves: uvicorn over the application, connections that must get on with it, and an end that drains."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from asyncio import TimerHandle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lorakit.errors import LorakitError
from lorakit.serve.http.api import build
from lorakit.serve.http.front import Front

log = logging.getLogger("lorakit.serve")

CONNECTIONS = 1024
"""Connections at once. A further one takes the place of the one that has been idle for longest; where all are busy it is
answered 503 by uvicorn."""

HEADER_BYTES, HEADER_FIELDS = 64 * 2**10, 128
"""What comes before the body of one request, at most; beyond it the answer is 431."""

WATCH = 0.25
"""Seconds between two looks at whether the engine has given up."""

_TOO_MUCH = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"The headers of a request have %d bytes and %d fields at most.\n" % (HEADER_BYTES, HEADER_FIELDS)
)


def protocol_for(seconds: float, most: int) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with bounds that it lacks, for every request of a connection: what comes before the body has a
    size at most, and `seconds` from its first byte (of the first request: from the connection) to be there.

    Between two requests uvicorn's keep-alive timeout holds, for bodies the guard's.

    Args:
        seconds: for the headers of a request.
        most: connections; the one that has been idle for longest is closed where a new one would be one too many.
    """
    idle: dict[Any, None] = {}  # in the order in which they became so

    class Punctual(HttpToolsProtocol):
        _overdue: TimerHandle | None = None
        _within = _ended = False  # between the headers of a request and its end; one ended in these bytes
        _raw = _bytes = _fields = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            idle[self] = None
            self._due()
            # uvicorn refuses what comes when `most` are there, the new one counted
            for other in list(idle)[: max(0, len(self.connections) + 1 - most)]:
                if other is not self:
                    other.transport.abort()
                    other.connections.discard(other)
                    idle.pop(other, None)

        def data_received(self, data: bytes) -> None:
            if self._overdue is None and self in idle:
                self._due()  # the first byte of a further request
            self._ended = False
            super().data_received(data)
            # the parser keeps the pieces of a field until it is whole
            self._raw = 0 if self._within or self._ended else self._raw + len(data)
            if self._raw > HEADER_BYTES:
                self._refuse()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._bytes = self._fields = 0

        def on_url(self, url: bytes) -> None:
            self._count(len(url), 0)
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value), 1)
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._within = True
            self._done()
            if not self.transport.is_closing():
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if not self.transport.is_closing():
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._within, self._ended = False, True
            if not self.transport.is_closing():
                super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.transport.is_closing() and self.cycle.response_complete:
                idle[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._done()
            super().connection_lost(exc)

        def _count(self, size: int, fields: int) -> None:
            self._bytes += size
            self._fields += fields
            if self._bytes > HEADER_BYTES or self._fields > HEADER_FIELDS:
                self._refuse()

        def _refuse(self) -> None:
            if not self.transport.is_closing():
                if self.cycle is None or self.cycle.response_complete:  # else an answer is on its way
                    self.transport.write(_TOO_MUCH)
                    self.transport.close()
                else:
                    self.transport.abort()

        def _due(self) -> None:
            self._overdue = self.loop.call_later(seconds, self.transport.abort)

        def _done(self) -> None:
            """The headers are there, or nobody waits for them."""
            idle.pop(self, None)
            if self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None

    return Punctual


def server_for(app: ASGIApp, front: Front, host: str, port: int, grace: float) -> uvicorn.Server:
    """A server that is not yet running."""
    most = connections()
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            http=protocol_for(front.bounds.upload, most),
            limit_concurrency=most,
            timeout_graceful_shutdown=max(1, round(grace)),
            timeout_keep_alive=30,
        )
    )


def connections() -> int:
    """Connections at once: `CONNECTIONS`, or what the system's limit on open files leaves."""
    if sys.platform == "win32":
        return CONNECTIONS
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else max(8, min(CONNECTIONS, files - 128))


def run(
    front: Front,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 30.0,
    started: Callable[[str], None] | None = None,
    ending: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new, let what runs end within `grace` seconds, and return.

    SIGHUP reads the keys and looks at the store again without dropping a request. `started` gets the URL; `ending` is called
    once when the end begins.

    Raises:
        LorakitError: the port cannot be had, or the engine has given up: a process that cannot answer any more ends, so that
            whoever watches over it starts another.
    """

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        yield
        # uvicorn has waited for the answers on their way; what the engine still has belongs to nobody
        await asyncio.to_thread(front.engine.drain, 1.0)
        await asyncio.to_thread(front.engine.stop)

    server = server_for(build(front, life), front, host, port, grace)

    async def watch() -> None:
        while not (server.should_exit or front.engine.failure):
            await asyncio.sleep(WATCH)
        server.should_exit = True
        if ending is not None:
            ending()

    async def serve() -> None:
        with suppress(NotImplementedError, AttributeError):  # SIGHUP is not everywhere
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, refresh, front)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started and started is not None:
            place = server.servers[0].sockets[0].getsockname()
            started(f"http://{host}:{place[1]}")
        watching = asyncio.create_task(watch())
        await task
        watching.cancel()

    # uvicorn raises the signal that ended it once more when it is done; ours then has nothing left to do
    previous = {one: signal.signal(one, _nothing) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(serve())
    except SystemExit:
        raise LorakitError(
            f"serve: cannot listen on {host}:{port} (the line above says why); another --port may work."
        ) from None
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
        front.engine.stop()
    if front.engine.failure:
        raise LorakitError(f"serve: the engine has given up: {front.engine.failure}")


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def refresh(front: Front) -> None:
    """Read the keys again and look for new adapters."""
    try:
        names = front.tenants.reload()
        found = front.engine.adapters.scan()
    except LorakitError as problem:
        log.error("%s Everything stays as it was.", problem)
        return
    log.info("reloaded", extra={"data": {"tenants": len(names), "adapters": len(found)}})
