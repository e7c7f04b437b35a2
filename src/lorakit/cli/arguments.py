"""Arguments and flags that several verbs have, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="BASE", help="Base model: hub name, local folder or GGUF file.")]
Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")]
Adapters = Annotated[list[Path] | None, typer.Option("--adapter", "-a", help="Adapter folder; repeat to load several.")]
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
