"""The operator's endpoints: what adapters there are and where they are, and moving them. They need the admin key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from starlette.requests import Request

from lorakit.errors import LorakitError
from lorakit.serve.http.bodies import AdapterList, TenantList, errors
from lorakit.serve.http.faults import Fault
from lorakit.serve.http.front import Front, front_of
from lorakit.serve.http.guard import KEY
from lorakit.serve.request import AdapterInfo

router = APIRouter(
    prefix="/admin",
    dependencies=[Depends(KEY)],
    responses=errors(
        e400="The adapter cannot be used; the reason says why.",
        e401="No key, or a wrong one.",
        e403="The admin key is needed.",
        e404="The store holds no such adapter.",
        e429="There is no room for it now.",
    ),
)

Name = Annotated[str, Path(max_length=200, description="An adapter of the store.")]

ACTIONS = {
    "load": "Read an adapter into memory; answers when it is there.",
    "unload": "Let an adapter go when the requests that run with it have ended.",
    "pin": "Read an adapter into memory and keep it there.",
    "unpin": "Let a pinned adapter be dropped again when room is needed.",
    "reload": "Read an adapter's files again; running requests end with what they began with.",
}


@router.get("/adapters")
def listed(request: Request) -> AdapterList:
    """Every adapter of the store: its state, rank, memory and use."""
    return AdapterList(adapters=list(front_of(request).engine.adapters.all()))


@router.post("/adapters/scan")
def scan(request: Request) -> AdapterList:
    """Look for new folders in the store."""
    front_of(request).engine.adapters.scan()
    return listed(request)


@router.get("/adapters/{name}")
def one(request: Request, name: Name) -> AdapterInfo:
    """One adapter."""
    return front_of(request).engine.adapters.info(name)


def _action(verb: str) -> Callable[[Request, str], AdapterInfo]:
    """An endpoint that does something with an adapter of the store. In a thread: reading one may take a while."""

    def act(request: Request, name: Name) -> AdapterInfo:
        request.state.note["adapter"] = name
        adapters = front_of(request).engine.adapters
        if name not in adapters.names() and name not in adapters.scan():
            raise Fault(404, f'the store holds no adapter "{name}".', "model_not_found", "name")
        found: AdapterInfo = getattr(adapters, verb)(name)
        return found

    return act


for _verb, _about in ACTIONS.items():
    router.post(f"/adapters/{{name}}/{_verb}", name=_verb, description=_about)(_action(_verb))


@router.get("/usage")
def usage(request: Request) -> dict[str, dict[str, int]]:
    """What every tenant has used since the server was started."""
    tenants = front_of(request).tenants
    return {name: dict(tenants.ledger(tenant).used) for name, tenant in list(tenants.tenants.items())}


@router.post("/keys/reload")
def reload_keys(request: Request) -> TenantList:
    """Read the file of keys again."""
    front: Front = front_of(request)
    try:
        return TenantList(tenants=front.tenants.reload())
    except LorakitError as problem:
        raise Fault(400, front.tenants.without_path(str(problem)), "keys_unreadable") from problem
