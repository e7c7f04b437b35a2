"""`lorakit init`: a run's YAML for a base and a data file, or from a file of another program, every option explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.arguments import Overwrite
from lorakit.cli.screen import err, out
from lorakit.errors import plural

HELP = "Write a commented YAML for training BASE on DATA, or from a file of Axolotl or LLaMA-Factory (--from)."


def init(
    base: Annotated[
        str | None, typer.Argument(metavar="[BASE]", help="Base model: hub name, local folder or GGUF file.")
    ] = None,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Rows to train on: a file, a folder or a dataset's name.")
    ] = None,
    foreign: Annotated[
        Path | None, typer.Option("--from", help="A YAML or JSON file of Axolotl or LLaMA-Factory to convert.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file to write.")] = Path("run.yaml"),
    overwrite: Overwrite = False,
) -> None:
    """Read the columns of the data, and write the file."""
    from lorakit.errors import LorakitError
    from lorakit.files.folder import claim, write_whole
    from lorakit.models.loading import find_local
    from lorakit.train.config.run import DataOptions, TrainConfig, TrainOptions, to_yaml
    from lorakit.train.data.formats import as_known, detect_format
    from lorakit.train.data.reading import load_rows

    if (base is None or data is None) == (foreign is None):
        raise LorakitError("init: give BASE and DATA, or --from FILE of Axolotl or LLaMA-Factory")
    claim(output, (), overwrite, "init")
    if foreign is not None:
        from lorakit.train.config.foreign import converted
        from lorakit.train.config.run import from_tree

        program, tree, left = converted(foreign)
        for line in left:
            err.print(f"left out: {line}", markup=False)
        config = from_tree(tree, str(foreign))
        told = [f"# from {foreign} ({program})", *(f"# left out: {line}" for line in left)]
        write_whole(output, ("\n".join(told) + "\n\n" + to_yaml(config)).encode())
        out.print(f"{output}: from {foreign} ({program}); next: lorakit train {output} --check", markup=False)
        return
    assert base is not None
    assert data is not None
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
    out.print(f"{output}: {plural(len(rows), 'row')} ({found}); next: lorakit train {output} --check", markup=False)
