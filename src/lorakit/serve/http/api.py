"""The HTTP API: OpenAI's endpoints over an engine, and the operator's."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from lorakit import __version__
from lorakit.errors import LorakitError
from lorakit.files.prompt import Prompter
from lorakit.serve.http.admin import router as admin
from lorakit.serve.http.alias_admin import router as aliases
from lorakit.serve.http.answer import Chat, Completion, Shape, respond
from lorakit.serve.http.bodies import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Generation,
    Health,
    Model,
    Models,
    errors,
)
from lorakit.serve.http.dialects import router as dialects
from lorakit.serve.http.faults import Fault, fault_of
from lorakit.serve.http.front import Front, front_of, new_key, tenant_of
from lorakit.serve.http.guard import KEY, Guard
from lorakit.serve.http.tenants import Tenant
from lorakit.serve.http.text import encode_messages, encode_prompt
from lorakit.serve.http.tokens import router as tokens
from lorakit.serve.request import AdapterInfo

_UNKNOWN_KEY = errors(e401="No key, or a wrong one.")
_ERRORS = _UNKNOWN_KEY | errors(
    e400="A parameter is wrong or not supported; `param` names it.",
    e404="No such model for this key.",
    e413="The body is too long.",
    e429="A quota or the queue is full; `Retry-After` says when to try again.",
    e503="The server is not ready or is shutting down.",
)
public = APIRouter()
router = APIRouter(dependencies=[Depends(KEY)])

_LONG = 20_000
"""The prompts of bodies of more bytes are read into tokens in another thread, so that nobody waits for them; and so are all
prompts in the form of an adapter, whose template is a program of its maker's."""

_BRANCH = re.compile(r"str|int|constrained-\w+|list\[.*|function-.*|\[key\]")
"""How pydantic names the kinds that a value may be of; no word of the client's."""


def build(front: Front, lifespan: Callable[[Any], Any] | None = None) -> ASGIApp:
    """The whole application over what it serves. `lifespan` is an async context around the time in which it serves."""
    return Guard(application(front, lifespan), front)


def application(front: Front, lifespan: Callable[[Any], Any] | None = None) -> FastAPI:
    """The application without its guard; for its description, and for tests of it."""
    app = FastAPI(
        title="lorakit",
        version=__version__,
        description="Many low-rank adapters on one base model. `model` names the base or an adapter.",
        docs_url=None,  # they load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan or _nothing,
    )
    app.state.front = front
    for part in (public, router, tokens, dialects, aliases, admin):
        app.include_router(part)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(LorakitError, _fault)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _describe(described())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _nothing(app: FastAPI) -> AsyncIterator[None]:
    yield


def _describe(schema: dict[str, Any]) -> None:
    """Takes FastAPI's own 422 out of the description: what is invalid is a 400 here, in OpenAI's shape."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


# -- errors ------------------------------------------------------------------------------------------------------------------


def _answer(request: Request, fault: Fault) -> Response:
    request.state.note["code"] = fault.code
    return fault.response()


async def _fault(request: Request, error: Exception) -> Response:
    return _answer(request, fault_of(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        fault = Fault(404, f"there is no {request.method} {request.url.path} here.", "no_such_endpoint")
    else:
        fault = Fault(error.status_code, str(error.detail), "http", headers=error.headers)
    return _answer(request, fault)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, by the name of the parameter."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    # where a value may be one of several kinds, each kind has its complaint; the one that got furthest is the client's
    first = max(
        (one for one in found if one["loc"][:2] == found[0]["loc"][:2]),
        key=lambda one: (one["type"] == "too_long", len(one["loc"])),
    )
    place = [str(one) for one in first["loc"] if one != "body"]
    # a place within a union ends in the name of the branch that was tried: none of the client's words
    param = ".".join(one for one in place if not _BRANCH.fullmatch(one))
    match first["type"]:
        case "extra_forbidden":
            message, code = f'"{param}" is not a parameter of this endpoint; leave it out.', "unknown_parameter"
        case "missing":
            message, code = f'"{param or "the body"}" is missing.', "missing_parameter"
        case "json_invalid":
            message, code, param = "the body is not valid JSON.", "invalid_json", ""
        case "value_error":
            error = first["ctx"]["error"]
            message, code, param = str(error), "invalid_value", getattr(error, "param", param)
        case _:
            message, code = f'"{param or "the body"}": {first["msg"]}.', "invalid_value"
    return _answer(request, Fault(400, message, code, param or None))


# -- generation --------------------------------------------------------------------------------------------------------------


async def _blend(front: Front, asked: Generation, tenant: Tenant) -> dict[str, float]:
    """The adapters that are asked for. Before a name is called unknown, the store is looked at again."""
    try:
        return front.blend(asked, tenant)
    except Fault as fault:
        if fault.status != 404 or not await run_in_threadpool(front.scan):
            raise
        return front.blend(asked, tenant)


async def _generate(
    request: Request,
    asked: ChatRequest | CompletionRequest,
    kind: str,
    read: Callable[[Prompter, int], list[list[int]]],
) -> Response:
    """Names, prompts, limits, quotas, engine, answer: the same for both kinds of completion."""
    front, tenant, note = front_of(request), tenant_of(request), request.state.note
    note["model"] = asked.model
    front.check_count(asked)  # what is cheap comes first
    blend = await _blend(front, asked, tenant)
    # an adapter's prompt may have to be read first, which takes long where it brings a tokenizer
    prompter = front.prompts.base
    if blend and front.store is not None:
        prompter = await run_in_threadpool(front.prompter, blend, isinstance(asked, ChatRequest))
    window = front.engine.context
    long = getattr(request.state, "size", _LONG + 1) > _LONG or prompter is not front.prompts.base
    prompts = await run_in_threadpool(read, prompter, window) if long else read(prompter, window)
    sampling = front.sampling(asked, prompts, prompter)
    front.metrics.tenant.labels(front.metrics.label("tenant", tenant.name)).inc()
    constraint = await run_in_threadpool(front.constraint, asked, prompter) if asked.form is not None else None
    order = front.submit(asked, tenant, blend, prompts, sampling, new_key(kind), prompter, constraint)
    shape: Shape = (
        Chat(front, asked, prompter) if isinstance(asked, ChatRequest) else Completion(front, asked, prompter, prompts)
    )
    return await respond(front, shape, order, request.receive, note)


_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={**_ERRORS, 200: {"model": ChatAnswer, "content": _STREAM}},
)
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer a conversation, whole or as a stream of events."""

    def read(prompter: Prompter, window: int) -> list[list[int]]:
        return [encode_messages(prompter, asked.messages, window)]

    return await _generate(request, asked, "chatcmpl", read)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={**_ERRORS, 200: {"model": CompletionAnswer, "content": _STREAM}},
)
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Continue texts or token ids, whole or as a stream of events."""

    def read(prompter: Prompter, window: int) -> list[list[int]]:
        return [encode_prompt(prompter, prompt, window) for prompt in asked.prompts]

    return await _generate(request, asked, "cmpl", read)


# -- what there is -------------------------------------------------------------------------------------------------------------


async def _models(request: Request) -> list[Model]:
    front, tenant = front_of(request), tenant_of(request)
    with suppress(LorakitError):  # a store that is away for a moment: what is known is answered
        await run_in_threadpool(front.scan)
    common: dict[str, Any] = {"created": front.created, "root": front.name, "max_model_len": front.engine.context}
    base = [Model(id=front.name, **common)] if tenant.base else []

    def about(info: AdapterInfo) -> dict[str, str | int] | None:
        return {"method": info.method, "rank": info.rank, "content": info.content} if info.content else None

    usable = await run_in_threadpool(front.usable, tenant)
    return base + [
        Model(
            id=one.name,
            parent=front.name,
            lorakit=about(one),
            how=one.how or None,
            reason=one.reason or None,
            **common,
        )
        for one in usable
    ]


@router.get("/v1/models", responses=_UNKNOWN_KEY)
async def models(request: Request) -> Models:
    """The base model and the adapters that this key may use; those that cannot be served stand apart, with the reason."""
    refused = await run_in_threadpool(front_of(request).refused, tenant_of(request))
    return Models(data=await _models(request), refused=refused)


@router.get("/v1/models/{model:path}", responses=_UNKNOWN_KEY | errors(e404="No such model for this key."))
async def model(request: Request, model: str) -> Model:
    """One of them."""
    for found in await _models(request):
        if found.id == (front_of(request).name if model in front_of(request).reserved else model):
            return found
    raise Fault(404, f'this key has no model "{model}".', "model_not_found", "model")


@router.get("/v1/usage", responses=_UNKNOWN_KEY)
async def usage(request: Request) -> dict[str, int | str]:
    """What this key's tenant has used since the server was started."""
    tenant = tenant_of(request)
    return {"tenant": tenant.name, **front_of(request).tenants.ledger(tenant).used}


@public.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(request: Request) -> Response:
    """Whether the process answers and its engine has not given up; a supervisor restarts it while this is 503."""
    failed = front_of(request).engine.failure
    return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)


@public.get("/ready", response_model=Health, responses={503: {"model": Health}})
async def ready(request: Request) -> Response:
    """Whether requests are taken; a load balancer sends none here while this is 503."""
    is_ready = front_of(request).engine.ready()
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """Counters in Prometheus' format."""
    return Response(front_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
