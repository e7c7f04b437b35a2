"""`lorakit verify`: does an adapter compute the same merged as unmerged?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.arguments import Adapter, Base
from lorakit.cli.outcome import on_base
from lorakit.cli.screen import out
from lorakit.errors import LorakitError
from lorakit.reading import read_text

HELP = "Check that merging an adapter changes nothing, per layer and on the logits of prompts."
PROMPTS = (
    "Classify the sentiment of this review as positive or negative: A film that is better than it has any right to be.",
    "The three largest cities of Italy are Rome, Milan and",
    "Write a function that returns the n-th Fibonacci number.",
    "Dear Sir or Madam, I am writing to complain about",
)


def verify(
    adapter: Adapter,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to compare on; repeat for several.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with one prompt per line.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype to merge in: bf16, fp16, fp32; auto is the base's own.")] = "auto",
    base: Base = None,
    card: Annotated[bool, typer.Option("--card", help="Also write the result into the adapter's README.md.")] = False,
) -> None:
    """Verify, and print the result; exit status 1 where merging is wrong."""
    from lorakit.algebra.verification import verify as verify_adapter
    from lorakit.models.loading import resolve_dtype
    from lorakit.models.stored import stored_dtype
    from lorakit.models.tasks import task_of_base

    texts = list(prompt or ())
    if file is not None:
        texts += [line.strip() for line in read_text(file, "verify").splitlines() if line.strip()]
    if not all(text.strip() for text in prompt or ()) or (file is not None and not texts):
        raise LorakitError(
            f"verify: {'a --prompt' if file is None else file} is empty; there is nothing to compare on."
        )
    with on_base("verify", [adapter], base, always=True) as given:
        wanted = stored_dtype(str(given.base)) if dtype == "auto" else resolve_dtype(dtype)[0]
        prompts = [dict(given.tokenizer(text, return_tensors="pt")) for text in texts or PROMPTS]
        prompts = [{key: value for key, value in one.items() if key != "token_type_ids"} for one in prompts]
        if task_of_base(getattr(given.loaded[0].model, "config", None)) == "seq2seq":
            prompts = [{**one, "decoder_input_ids": one["input_ids"]} for one in prompts]
        found = verify_adapter(given.loaded[0], prompts, dtype=wanted)
    out.print(found.words(str(adapter)), markup=False)
    if card:
        write_into_card(adapter, found.words("this adapter"))
    if not found.agrees:
        raise typer.Exit(1)


def write_into_card(folder: Path, words: str) -> None:
    """A section of the model card, in place of an earlier one."""
    from lorakit.files.folder import write_whole
    from lorakit.train.report import CARD

    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {folder.name}\n"
    head, _, rest = text.partition("\n## Merging\n")
    _, following, tail = rest.partition("\n## ")
    write_whole(path, f"{head.rstrip()}\n\n## Merging\n\n{words}\n{following}{tail}".encode())
