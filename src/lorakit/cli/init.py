"""`lorakit init`: a run's YAML for a base and a data file, every option with its default and a line about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.arguments import Model, Overwrite
from lorakit.cli.screen import out

HELP = "Write a commented YAML for training BASE on DATA, to be edited and given to train."


def init(
    base: Model,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Rows to train on: a file, a folder or a dataset's name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file to write.")] = Path("run.yaml"),
    overwrite: Overwrite = False,
) -> None:
    """Read the columns of the data, and write the file."""
    from lorakit.files.folder import claim, write_whole
    from lorakit.models.loading import find_local
    from lorakit.train.config.run import DataOptions, TrainConfig, TrainOptions, to_yaml
    from lorakit.train.data.formats import as_known, detect_format
    from lorakit.train.data.reading import load_rows

    claim(output, (), overwrite, "init")
    find_local(base)
    rows = load_rows(data)
    found = detect_format(tuple(dict.fromkeys(name for row in rows.rows for name in as_known(row.fields))), data)
    size = 0.1 if len(rows) >= 20 else 0
    config = TrainConfig(
        model=base,
        task="seq-cls" if found == "classification" else "causal-lm",
        data=DataOptions(train=data, evaluation_size=size),
        train=TrainOptions(output=f"adapters/{output.stem}"),
    )
    write_whole(output, to_yaml(config).encode())
    out.print(f"{output}: {len(rows):,} rows ({found}); next: lorakit train {output} --check", markup=False)
