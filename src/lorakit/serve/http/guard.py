"""What every request passes before anything reads it: its id, its host, its key, the size and the pace of its body.

Plain ASGI, outside the application: a client without a key cannot make the server parse anything, and a body that is too
long or too slow is refused before it is read to the end. What happened is logged and counted here, once for each request.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.serve.http.faults import Fault, fault_of
from lorakit.serve.http.front import Front
from lorakit.serve.http.tenants import Tenant

log = logging.getLogger("lorakit.serve")

KEY = HTTPBearer(auto_error=False, description="A key made by `lorakit keys`; it is checked before anything is read.")
"""Says in the API's description that an endpoint needs a key; the check itself is `Guard.tenant`."""

PUBLIC = frozenset({"/health", "/ready", "/openapi.json"})
"""Paths that say nothing of any tenant and need no key."""
ADMIN = frozenset(f"{root}/{verb}load_lora_adapter" for root in ("", "/v1") for verb in ("", "un"))
"""Paths beside /admin that are the admin's."""
_ID = re.compile(r"[\w.:-]{1,128}")
_CLOSE = {"Connection": "close"}

_READ_ON = 4
"""A body without a stated length that is too long is read on, and thrown away, up to this many times what it may have: a
connection that is closed while its client still sends is reset, and the client then never reads why."""


class Guard:
    """The outermost part of the server."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self.app, self.front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or one event of the server's life."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Passage(self, scope, receive, send).run()

    def tenant(self, headers: Headers, path: str) -> Tenant | None:
        """Who asks.

        Raises:
            Fault: no key, a wrong key, or an endpoint that is the admin's.
        """
        front = self.front
        admin = path.startswith("/admin") or path in ADMIN
        if path in PUBLIC:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        tenant = front.tenants.find(key.strip() if scheme.lower() == "bearer" else None)
        if tenant is None:
            raise Fault(
                401,
                "this server needs a key: Authorization: Bearer lk-… The one that came is missing or unknown.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", **_CLOSE},
            )
        if admin and not front.admin:
            raise Fault(
                403,
                "the admin endpoints are closed: this server has no keys and can be reached from other machines. Start it "
                "with --keys FILE.",
                "admin_closed",
            )
        if (admin or path == "/metrics") and not tenant.admin:
            raise Fault(403, f"{path} needs the admin key.", "admin_only")
        return tenant

    def check_host(self, headers: Headers) -> None:
        """Refuse a request that a web page has tricked a browser on this machine into sending here under another name."""
        hosts = self.front.hosts
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if hosts and host not in hosts:
            raise Fault(421, f'this server does not answer to the host name "{host}".', "wrong_host", headers=_CLOSE)


class _Passage:
    """One request on its way through."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope, self.receive, self.outer = guard, scope, receive, send
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        self.began = time.monotonic()
        self.status = 0
        self.note: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state["note"], state["id"] = self.note, self.id

    async def run(self) -> None:
        """Through, or back with a Fault; then into the log."""
        try:
            try:
                self.guard.check_host(self.headers)
                tenant = self.guard.tenant(self.headers, self.scope["path"])
                self.scope["state"]["tenant"] = tenant
                if tenant is not None:
                    self.note["tenant"] = tenant.name
                body = await self._body()
                self.scope["state"]["size"] = len(body)
                await self.guard.app(self.scope, _replay(body, self.receive), self.send)
            except Fault as fault:
                self.note["code"] = fault.code
                if not self.status:
                    await fault.response()(self.scope, self.receive, self.send)
        except Exception as error:
            self.note["code"] = "internal"
            log.exception("failed", extra={"data": {"request_id": self.id}})
            if not self.status:
                await fault_of(error).response()(self.scope, self.receive, self.send)
        finally:
            self._record()

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on; the first one gets the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.id
        await self.outer(message)

    async def _body(self) -> bytes:
        """The whole body, if it is not too long and comes in time."""
        most, seconds = self.guard.front.bounds.body, self.guard.front.bounds.upload
        length = self.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise self._too_long(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Fault(499, "the client disconnected before its request was complete.", "client_left")
                    part, more = message.get("body", b""), message.get("more_body")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif not more or size > _READ_ON * most:
                        raise self._too_long(most)
                    if not more:
                        return b"".join(parts)
        except TimeoutError:
            raise Fault(
                408, f"the request body did not arrive within {seconds:.0f} s.", "slow_body", headers=_CLOSE
            ) from None

    def _too_long(self, most: int) -> Fault:
        return Fault(
            413, f"the request body is larger than the limit of {most:,} bytes.", "body_too_large", headers=_CLOSE
        )

    def _record(self) -> None:
        seconds = time.monotonic() - self.began
        route = getattr(self.scope.get("route"), "path", "none")
        self.guard.front.metrics.answered(route, self.status or 499, seconds, self.note.get("code"))
        if self.scope["path"] in ("/health", "/ready", "/metrics") and self.status == 200:
            return  # asked every few seconds, by machines
        line = {"request_id": self.id, "method": self.scope["method"], "path": self.scope["path"][:200]}
        line |= {"status": self.status or 499, "seconds": round(seconds, 4), **self.note}
        log.info("request", extra={"data": line})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read, and then what comes after it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
