"""The operator's endpoints: what adapters there are and where they are, and moving them. They need the admin key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from lorakit.errors import LorakitError
from lorakit.serve.http.faults import Fault
from lorakit.serve.http.front import Front
from lorakit.serve.http.schema import Adapter, AdapterList, ErrorAnswer, TenantList
from lorakit.serve.request import AdapterInfo

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The adapter cannot be used; the reason says why."},
    401: {"model": ErrorAnswer},
    403: {"model": ErrorAnswer, "description": "The admin key is needed."},
    404: {"model": ErrorAnswer, "description": "The store holds no such adapter."},
    429: {"model": ErrorAnswer, "description": "There is no room for it now."},
}
router = APIRouter(prefix="/admin", responses=_ERRORS)

Key = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
Name = Annotated[str, Path(max_length=200, description="An adapter of the store.")]


def _front(request: Request) -> Front:
    front: Front = request.app.state.front
    return front


def _shown(info: AdapterInfo) -> Adapter:
    return Adapter(**dataclasses.asdict(info))


def _act(request: Request, name: str, verb: str) -> Adapter:
    """Do something with an adapter of the store. In a thread: reading one may take a while."""
    request.state.note["adapter"] = name
    adapters = _front(request).engine.adapters
    if name not in adapters.names() and name not in adapters.scan():
        raise Fault(404, f'the store holds no adapter "{name}".', "model_not_found", "name")
    act: Callable[[str], AdapterInfo] = getattr(adapters, verb)
    return _shown(act(name))


@router.get("/adapters")
def listed(request: Request, key: Key) -> AdapterList:
    """Every adapter of the store: its state, rank, memory and use."""
    return AdapterList(adapters=[_shown(info) for info in _front(request).engine.adapters.all()])


@router.post("/adapters/scan")
def scan(request: Request, key: Key) -> AdapterList:
    """Look for new folders in the store."""
    _front(request).engine.adapters.scan()
    return listed(request, key)


@router.get("/adapters/{name}")
def one(request: Request, name: Name, key: Key) -> Adapter:
    """One adapter."""
    return _shown(_front(request).engine.adapters.info(name))


@router.post("/adapters/{name}/load")
def load(request: Request, name: Name, key: Key) -> Adapter:
    """Read an adapter into memory; answers when it is there."""
    return _act(request, name, "load")


@router.post("/adapters/{name}/unload")
def unload(request: Request, name: Name, key: Key) -> Adapter:
    """Let an adapter go when the requests that run with it have ended."""
    return _act(request, name, "unload")


@router.post("/adapters/{name}/pin")
def pin(request: Request, name: Name, key: Key) -> Adapter:
    """Read an adapter into memory and keep it there."""
    return _act(request, name, "pin")


@router.post("/adapters/{name}/unpin")
def unpin(request: Request, name: Name, key: Key) -> Adapter:
    """Let a pinned adapter be dropped again when room is needed."""
    return _act(request, name, "unpin")


@router.post("/adapters/{name}/reload")
def reload(request: Request, name: Name, key: Key) -> Adapter:
    """Read an adapter's files again; running requests end with what they began with."""
    return _act(request, name, "reload")


@router.post("/keys/reload")
def reload_keys(request: Request, key: Key) -> TenantList:
    """Read the file of keys again."""
    try:
        return TenantList(tenants=_front(request).tenants.reload())
    except LorakitError as problem:
        raise Fault(400, str(problem), "keys_unreadable") from problem
