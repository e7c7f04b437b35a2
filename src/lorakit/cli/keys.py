"""`lorakit keys`: make an API key, show it once, and write its hash into the file that `lorakit serve --keys` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.screen import err

HELP = "Make an API key for a tenant of `lorakit serve`. The file keeps its hash only; the key is shown once."


def keys(
    file: Annotated[Path, typer.Argument(help="The file of keys (YAML or JSON); created if it does not exist.")],
    tenant: Annotated[str, typer.Argument(help="Whose key; a tenant may have several.")] = "",
    admin: Annotated[bool, typer.Option("--admin", help="Make a key for the admin endpoints.")] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter that the tenant may use, or a pattern (law-*); may be repeated; default: all."),
    ] = None,
    base: Annotated[bool, typer.Option(help="Allow the base model without an adapter.")] = True,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Rate limit; 0: none.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Rate limit of prompt and answer tokens; 0: none.")] = 0,
    concurrent: Annotated[int, typer.Option(min=0, help="Answers at once; 0: no limit.")] = 0,
    weight: Annotated[float, typer.Option(min=0.001, help="Its share under load; 2 gets twice as much as 1.")] = 1.0,
) -> None:
    """Make a key and print it on stdout."""
    from lorakit.errors import LorakitError
    from lorakit.serve.http.tenants import Tenant, add_key

    if admin == bool(tenant):
        raise LorakitError("keys: name a tenant or give --admin, one of the two.")
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
    err.print(f"{file} has the hash of the new key; the key itself is shown only now:", markup=False)
    print(made)
