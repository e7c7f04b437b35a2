"""The process that serves: uvicorn over the application, connections that must get on with it, and an end that drains."""

from __future__ import annotations

import asyncio
import logging
import signal
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
"""Connections at once; more are answered 503 by uvicorn."""


def protocol_for(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, whose clients must send the headers of their first request within `seconds`.

    Later requests on the same connection fall under uvicorn's own keep-alive timeout, bodies under the guard's.
    """

    class Punctual(HttpToolsProtocol):
        _overdue: TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._overdue = self.loop.call_later(seconds, transport.abort)

        def on_headers_complete(self) -> None:
            self._punctual()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._punctual()
            super().connection_lost(exc)

        def _punctual(self) -> None:
            if self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None

    return Punctual


def server_for(app: ASGIApp, front: Front, host: str, port: int, grace: float) -> uvicorn.Server:
    """A server that is not yet running."""
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
            http=protocol_for(front.bounds.upload),
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(grace)),
            timeout_keep_alive=30,
        )
    )


def run(
    front: Front,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 30.0,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new, let what runs end within `grace` seconds, and return.

    SIGHUP reads the keys and looks at the store again without dropping a request. `started` gets the URL.
    """

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        yield
        # uvicorn has waited for the answers on their way; what the engine still has belongs to nobody
        await asyncio.to_thread(front.engine.drain, 1.0)
        await asyncio.to_thread(front.engine.stop)

    server = server_for(build(front, life), front, host, port, grace)

    async def serve() -> None:
        with suppress(NotImplementedError, AttributeError):  # SIGHUP is not everywhere
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, refresh, front)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started and started is not None:
            place = server.servers[0].sockets[0].getsockname()
            started(f"http://{host}:{place[1]}")
        await task

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
