"""`lorakit generate`: answers to prompts, from the base model or from adapters, on stdout."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lorakit.cli.arguments import Adapters, Dtype, Model, Quantize, Raw, System
from lorakit.cli.conversation import Sampling, write
from lorakit.cli.flags import flags
from lorakit.cli.screen import err, out, show_log
from lorakit.errors import LorakitError

HELP = "Answer prompts with a base model, or with each of several adapters. Prompts may come from stdin, one per line."


@flags()
def generate(
    base: Model,
    adapter: Adapters = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Prompt; repeat for several.")] = None,
    system: System = "",
    raw: Raw = False,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Answer every prompt with every adapter."""
    # stdin is read from a pipe only: waiting for lines at a keyboard would look like hanging
    prompts = (
        prompt or [] if sys.stdin.isatty() else prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    )
    if not prompts:
        raise LorakitError('generate: there is no prompt; give --prompt "...", or lines on stdin')
    if not all(text.strip() for text in prompts):
        raise LorakitError("generate: a --prompt is empty")
    show_log(err)
    from lorakit.cli.conversation import Speaker

    speaker = Speaker(base, adapter or [], dtype, quantize)
    routes: list[Any] = list(speaker.names) or [None]
    for text in prompts:
        messages = [{"role": "system", "content": system}] if system else []
        for route in routes:
            if len(routes) > 1:
                out.print(f"[bold]{route}[/bold]")
            speaker.seed(sampling.seed)
            ids = speaker.encode([*messages, {"role": "user", "content": text}], route, raw=raw)
            speaker.speak(ids, route, sampling=sampling, on_text=write)
            write("\n")
