"""Other servers' ways to load and list adapters, for tools that were made for them: vLLM's, SGLang's and llama.cpp's.

They do what /admin does, for the store's own adapters: a path is only ever compared with that of the adapter's folder, and
nothing is fetched. Loading and unloading need the admin key.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lorakit.errors import LorakitError
from lorakit.serve.http.bodies import Name, Scale, Strict, Text, errors
from lorakit.serve.http.faults import Fault, fault_of
from lorakit.serve.http.front import Front, front_of, number_of, tenant_of
from lorakit.serve.http.guard import KEY

router = APIRouter(
    dependencies=[Depends(KEY)],
    responses=errors(e400="The adapter cannot be used; the reason says why.", e404="The store holds no such adapter."),
)


class UnloadLora(Strict):
    """The body of /v1/unload_lora_adapter."""

    lora_name: Name
    lora_int_id: int | None = None


class LoadLora(UnloadLora):
    """The body of /v1/load_lora_adapter and of SGLang's /load_lora_adapter."""

    lora_path: Text
    load_inplace: bool = False
    pinned: bool = False


def _load(front: Front, asked: LoadLora) -> str:
    """Read an adapter of the store into memory; returns what was done."""
    name, adapters = asked.lora_name, front.engine.adapters
    if name in front.reserved:
        raise Fault(400, f'"{name}" is the base model; an adapter has another name.', "reserved_name", "lora_name")
    if name not in adapters.names() and name not in adapters.scan():
        raise Fault(404, f'the store holds no adapter "{name}".', "model_not_found", "lora_name")
    folder = None if front.store is None else front.store / name
    places = {name} if folder is None else {name, str(folder), str(folder.absolute()), str(folder.resolve())}
    if asked.lora_path.rstrip("/") not in places:
        raise Fault(
            400,
            f'lora_path is not the folder of "{name}" in this server\'s store, and it reads adapters from there alone. Put the '
            "folder into the store, and give its name or its path.",
            "foreign_path",
            "lora_path",
        )
    if asked.load_inplace:
        adapters.reload(name)
    elif adapters.info(name).state in ("resident", "pinned"):
        raise Fault(
            400, f'"{name}" is loaded already; load_inplace: true reads its files again.', "already_loaded", "lora_name"
        )
    (adapters.pin if asked.pinned else adapters.load)(name)
    return f"Success: LoRA adapter '{name}' added successfully."


def _unload(front: Front, asked: UnloadLora) -> str:
    name, adapters = asked.lora_name, front.engine.adapters
    if name not in adapters.names():
        raise Fault(404, f'the store holds no adapter "{name}".', "model_not_found", "lora_name")
    adapters.unload(name)
    return f"Success: LoRA adapter '{name}' removed successfully."


@router.post("/v1/load_lora_adapter")
async def load_lora(request: Request, asked: LoadLora) -> Response:
    """vLLM's: read an adapter of the store into memory."""
    return PlainTextResponse(await run_in_threadpool(_load, front_of(request), asked))


@router.post("/v1/unload_lora_adapter")
async def unload_lora(request: Request, asked: UnloadLora) -> Response:
    """vLLM's: let an adapter go when its requests have ended. It stays in the store, and the next request reads it again."""
    return PlainTextResponse(await run_in_threadpool(_unload, front_of(request), asked))


def _told(front: Front, problem: LorakitError | None) -> dict[str, Any]:
    loaded = [one.name for one in front.engine.adapters.all() if one.state in ("resident", "pinned")]
    if problem is not None:
        return {"success": False, "error_message": fault_of(problem).message, "loaded_adapters": loaded}
    return {"success": True, "error_message": "", "loaded_adapters": loaded}


@router.post("/load_lora_adapter")
async def load_sglang(request: Request, asked: LoadLora) -> dict[str, Any]:
    """SGLang's: the same, and what is in memory then."""
    return await _sglang(request, lambda front: _load(front, asked))


@router.post("/unload_lora_adapter")
async def unload_sglang(request: Request, asked: UnloadLora) -> dict[str, Any]:
    """SGLang's: the same, and what is in memory then."""
    return await _sglang(request, lambda front: _unload(front, asked))


async def _sglang(request: Request, act: Any) -> dict[str, Any]:
    front = front_of(request)
    try:
        await run_in_threadpool(act, front)
    except LorakitError as problem:
        return _told(front, problem)
    return _told(front, None)


@router.get("/lora-adapters")
async def lora_adapters(request: Request) -> list[dict[str, Any]]:
    """llama.cpp's: the adapters that this key may use. `id` goes into `lora` of a request."""
    usable = await run_in_threadpool(front_of(request).usable, tenant_of(request))
    return [{"id": number_of(one.name), "path": one.name, "scale": 0.0} for one in usable]


@router.post("/lora-adapters")
async def set_lora_adapters(request: Request, asked: list[Scale]) -> None:
    """llama.cpp's scales for everybody, which a server of many tenants has not."""
    raise Fault(
        400,
        "scales for all requests cannot be set: tenants share this server. Give each request its own: lora: "
        '[{"id": …, "scale": …}], or model, or adapters.',
        "no_global_scales",
        "scale",
    )
