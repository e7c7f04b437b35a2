"""`lorakit predict`: the answers of an adapter to rows, one JSON object a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.arguments import Adapter, Base, Dtype, Overwrite
from lorakit.cli.screen import err, show_log

HELP = (
    "Answer rows with an adapter, whatever its task: classes, spans, summaries, vectors. Rows need no labels. Each line of the "
    'output is the row with "prediction". Task, classes, columns and base are those that the adapter records.'
)


def predict(
    adapter: Adapter,
    data: Annotated[str, typer.Argument(metavar="ROWS", help="Rows to answer: a file, a folder or a dataset's name.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file to write; by default standard output.")
    ] = None,
    base: Base = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per batch; by default the run's.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens of a generated answer.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer at most this many rows.")] = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Load base and adapter, and answer."""
    show_log(err)
    from lorakit.errors import LorakitError
    from lorakit.files.folder import claim, write_whole

    if output is not None:
        claim(output, (), overwrite, "predict")
    import lorakit as lk
    from lorakit.cli.conversation import check_adapters
    from lorakit.files.prompt import Prompter
    from lorakit.files.vocabulary import make_room
    from lorakit.train.data.formats import with_prompt
    from lorakit.train.data.reading import load_rows
    from lorakit.train.run import load_for
    from lorakit.train.tasks import check_columns
    from lorakit.train.tasks.record import recorded

    check_adapters([adapter], base)
    task, config, classes = recorded(adapter, base)
    train: dict[str, Any] = {"train__precision": dtype} if dtype != "auto" else {}
    train |= {"train__evaluation_batch_size": batch_size} if batch_size else {}
    config = config.replace(**train, **({"evaluate__max_new_tokens": max_new_tokens} if max_new_tokens else {}))
    rows = load_rows(data)
    rows = rows if limit is None else rows.take(rows.rows[:limit])
    if rows.bad:
        raise LorakitError(f"predict: {rows.bad[0]}")
    check_columns(task, rows, config, asked=True)
    model, tokenizer = load_for(config, classes)
    make_room(model, [adapter])
    loaded = lk.load(model, adapter, active=True)
    if loaded.prompt is not None:
        config = config.replace(data=with_prompt(config.data, loaded.prompt, rows))
        tokenizer = Prompter(tokenizer, loaded.prompt).tokenizer
    given = task.predict(model, tokenizer, rows, config, classes)
    lines = [
        json.dumps({**row.fields, "prediction": one}, ensure_ascii=False, default=str) + "\n"
        for row, one in zip(rows.rows, given, strict=True)
    ]
    if output is None:
        sys.stdout.write("".join(lines))
    else:
        write_whole(output, "".join(lines).encode())
