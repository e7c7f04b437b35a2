"""`lorakit verify`: does an adapter say the same merged as beside its base?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.outcome import on_base
from lorakit.cli.screen import out

HELP = "Compare an adapter merged with the same beside its base, per layer and on the logits of real prompts."
PROMPTS = (
    "Classify the sentiment of this review as positive or negative: A film that is better than it has any right to be.",
    "The three largest cities of Italy are Rome, Milan and",
    "Write a function that returns the n-th Fibonacci number.",
    "Dear Sir or Madam, I am writing to complain about",
)


def verify(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to compare on; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.")] = None,
    dtype: Annotated[
        str, typer.Option(help="The format to merge in: bf16, fp16, fp32; auto is the base's own.")
    ] = "auto",
    base: Annotated[str | None, typer.Option(help="The base model; by default the one in the file.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write what was found into the adapter's README.md.")
    ] = False,
) -> None:
    """Verify, and say what was found; exit status 1 where merging is wrong."""
    from lorakit.algebra.verification import verify as verify_adapter
    from lorakit.cli.merge import own_dtype
    from lorakit.errors import LorakitError
    from lorakit.models.loading import resolve_dtype

    texts = list(prompt or ())
    if file is not None:
        if not file.is_file():
            raise LorakitError(f"verify: there is no file {file}.")
        texts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    with on_base("verify", base, [adapter], always=True) as given:
        wanted = own_dtype(str(given.base)) if dtype == "auto" else resolve_dtype(dtype)[0]
        prompts = [dict(given.tokenizer(text, return_tensors="pt")) for text in texts or PROMPTS]
        prompts = [{key: value for key, value in one.items() if key != "token_type_ids"} for one in prompts]
        found = verify_adapter(given.adapters[0], prompts, dtype=wanted)
    out.print(found.words().replace(found.adapter, str(adapter)), markup=False)
    if card:
        write_into_card(adapter, found.words().replace(found.adapter, "this adapter"))
    if not found.agrees:
        raise typer.Exit(1)


def write_into_card(folder: Path, words: str) -> None:
    """A section of the model card, in place of an earlier one."""
    from lorakit.train.report import CARD, write_whole

    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {folder.name}\n"
    head, _, rest = text.partition("\n## Merging\n")
    following = rest.find("\n## ")
    tail = rest[following:] if rest and following >= 0 else ""
    write_whole(path, f"{head.rstrip()}\n\n## Merging\n\n{words}\n{tail}".encode())
