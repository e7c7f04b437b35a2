"""`lorakit generate`: answers to prompts, from the base model or from adapters, on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.screen import err, out, show_log

HELP = "Answer prompts with a base model, or with each of some adapters; prompts may also come from stdin, one a line."


def generate(
    base: Annotated[str, typer.Argument(help="The base model: a hub name, a local folder or a GGUF file.")],
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "-a", help="An adapter folder; give several to compare.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; give several to answer several.")
    ] = None,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="Number format: auto, bf16, fp16, fp32.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Hold the base in few bits: nf4, fp4, int8, ...")] = None,
) -> None:
    """Answer every prompt with every adapter."""
    from lorakit.errors import LorakitError

    prompts = list(prompt or _piped())
    if not prompts:
        raise LorakitError('generate: there is no prompt; give --prompt "...", or lines on stdin')
    show_log(err)
    import torch

    from lorakit.cli.conversation import Speaker

    speaker = Speaker(base, adapter or [], dtype, quantize)
    routes: list[Any] = list(speaker.names) or [None]
    for text in prompts:
        messages = [{"role": "system", "content": system}] if system else []
        ids = speaker.encode([*messages, {"role": "user", "content": text}], raw=raw)
        for route in routes:
            torch.manual_seed(seed)
            if len(routes) > 1:
                out.print(f"[bold]{route}[/bold]")
            speaker.speak(
                ids, route, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, on_text=_write
            )
            _write("\n")


def _piped() -> list[str]:
    """Prompts from stdin, one a line; none from a keyboard, where waiting for lines would look like hanging."""
    return [] if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
