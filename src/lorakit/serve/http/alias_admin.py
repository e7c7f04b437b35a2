"""The operator's endpoints for aliases. An alias lives as long as the process; whoever uses it needs the right to the adapter
that it means at the moment."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from pydantic import Field
from starlette.requests import Request

from lorakit.serve.http.bodies import Name, Strict, errors
from lorakit.serve.http.faults import Fault
from lorakit.serve.http.front import front_of
from lorakit.serve.http.guard import KEY


class AliasRequest(Strict):
    """The body of /admin/aliases/NAME: what an alias means."""

    adapters: dict[Name, Annotated[float, Field(gt=0, le=1)]] = Field(
        min_length=1, max_length=16, description="Adapter -> its share of the requests; together 1."
    )


router = APIRouter(
    prefix="/admin/aliases",
    dependencies=[Depends(KEY)],
    responses=errors(e400="What it is to mean is wrong.", e403="The admin key is needed.", e404="There is none."),
)
Alias = Annotated[str, Path(max_length=200, description="The alias.")]


@router.get("")
def listed(request: Request) -> dict[str, dict[str, float]]:
    """Every alias, and the shares of its adapters."""
    return front_of(request).aliases.all()


@router.post("/{name}")
def put(request: Request, name: Alias, asked: AliasRequest) -> dict[str, dict[str, float]]:
    """Let a name mean adapters of the store, by shares. The new version goes last, so that users move to it and not about."""
    front = front_of(request)
    known = {*front.engine.adapters.scan(), *front.engine.adapters.names()}
    if name in front.reserved or name in known:
        raise Fault(400, f'"{name}" is the name of the base or of an adapter already.', "reserved_name", "name")
    for adapter in asked.adapters:
        if adapter not in known or adapter in front.reserved:
            raise Fault(404, f'the store holds no adapter "{adapter}".', "model_not_found", f"adapters.{adapter}")
    if abs(sum(asked.adapters.values()) - 1) > 1e-6:
        raise Fault(400, "the shares of an alias add up to 1.", "invalid_value", "adapters")
    front.aliases.set(name, asked.adapters)
    return front.aliases.all()


@router.post("/{name}/rollback")
def rollback(request: Request, name: Alias) -> dict[str, dict[str, float]]:
    """What the alias meant before."""
    front_of(request).aliases.back(name)
    return front_of(request).aliases.all()
