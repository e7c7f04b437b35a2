"""`lorakit push`: an adapter's folder on the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.arguments import Adapter
from lorakit.cli.screen import err, out

HELP = "Upload an adapter to the Hugging Face hub: its own files alone, never the base."


def push(
    adapter: Adapter,
    name: Annotated[
        str | None, typer.Argument(metavar="[HUB_NAME]", help="owner/name; by default your name and the folder's.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; made if it is not there.")] = None,
) -> None:
    """Say what is uploaded, and upload it."""
    from lorakit.files.upload import plan_upload
    from lorakit.files.upload import push as upload

    planned = plan_upload(adapter)
    for file, size in planned.sizes():
        out.print(f"  {file}  {size:,} bytes", markup=False)
    if planned.kept:
        more = f" and {len(planned.kept) - 6} more" if len(planned.kept) > 6 else ""
        out.print(f"stays here: {', '.join(planned.kept[:6])}{more}", markup=False)
    if Path(planned.base).expanduser().is_dir():
        err.print(
            f"the adapter names its base as the folder {planned.base}, which nobody else has; write the base's hub name into "
            "adapter_config.json (base_model_name_or_path) and README.md",
            markup=False,
        )
    out.print(f"uploading {len(planned.files)} files of {planned.folder}", markup=False)
    out.print(f"uploaded: {upload(planned, name, private, revision)}", markup=False)
