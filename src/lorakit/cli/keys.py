"""`lorakit keys`: make an API key, show it once, and write its hash into the file that `lorakit serve --keys` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.screen import err

HELP = "Make an API key for a tenant of `lorakit serve`; the file keeps its hash only, and the key is shown once."


def keys(
    file: Annotated[Path, typer.Argument(help="The file of keys (YAML, or JSON); made where there is none.")],
    tenant: Annotated[str, typer.Argument(help="Whose key; a tenant that is there gets one key more.")] = "",
    admin: Annotated[bool, typer.Option("--admin", help="A key for the admin endpoints instead.")] = False,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter that it may use, or a pattern (law-*); several; default all.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Whether it may use the base model alone.")] = True,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="0 is no limit.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Prompts and answers together; 0 is no limit.")] = 0,
    concurrent: Annotated[int, typer.Option(min=0, help="Answers at once; 0 is no limit.")] = 0,
    weight: Annotated[float, typer.Option(min=0.001, help="Its share of the machine under load.")] = 1.0,
) -> None:
    """Make a key and print it on stdout."""
    from lorakit.errors import LorakitError
    from lorakit.serve.http.tenants import Tenant, add_key

    if admin == bool(tenant):
        raise LorakitError("keys: name a tenant, or say --admin; one of the two.")
    made = add_key(
        file.expanduser(),
        Tenant(
            name=tenant or "admin",
            adapters=tuple(adapter or ["*"]),
            base=base,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent=concurrent,
            weight=weight,
            admin=admin,
        ),
    )
    err.print(f"{file} keeps the hash; the key is shown only now:", markup=False)
    print(made)
