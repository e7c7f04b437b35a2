"""Arguments and flags that several verbs have, declared once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer


class NotFetchedError(Exception):
    """An adapter that the hub does not give. Not a ValueError, which typer would take for a misspelt flag."""


def adapter_path(value: str) -> Path:
    """A folder or file here, or an adapter on the hub (owner/name, owner/name@revision, owner/name/folder@revision), which is
    fetched and then is a folder of its own name."""
    path = Path(value).expanduser()
    if path.exists() or "/" not in str(value):
        return path
    from lorakit.models.hub import read_name

    named = read_name(str(value))
    if named is None or Path(named.repo).parent.exists():
        return path
    from lorakit.errors import LorakitError
    from lorakit.files.bundle import locate
    from lorakit.models.gguf import cache_root

    try:
        found = locate(str(value))
    except LorakitError as problem:
        raise NotFetchedError(str(problem)) from problem
    link = cache_root() / "hub" / "--".join(found.parts[-3:]) / named.name
    with contextlib.suppress(OSError):  # where there are no links it goes by the name that the cache gives it
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(found, target_is_directory=True)
        return link
    return found


Model = Annotated[
    str,
    typer.Argument(metavar="BASE", help="Base model: hub name (owner/name, owner/name@revision), folder or GGUF file."),
]
Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", parser=adapter_path, help="Adapter: a folder or a hub name (owner/name).")
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter", "-a", parser=adapter_path, help="Adapter: a folder or a hub name; repeat to load several."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result there.")]
Base = Annotated[
    str | None,
    typer.Option(help="Base model; by default the one that the adapter names. Loaded only where it is needed."),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of every layer.")]
Energy = Annotated[
    float | None, typer.Option(help="Instead of --rank: keep this share of each layer's squared singular values.")
]
Rows = Annotated[int, typer.Option(min=1, help="Number of rows to use.")]
Dtype = Annotated[str, typer.Option(help="Weight dtype: auto, bf16, fp16 or fp32.")]
Quantize = Annotated[str | None, typer.Option(help="Quantise the base: nf4, fp4, int8, ...")]
Raw = Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")]
System = Annotated[str, typer.Option(help="System message.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Picture = Annotated[Path | None, typer.Option(help="Also draw a picture: the PNG file to write.")]
