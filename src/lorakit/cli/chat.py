"""`lorakit chat`: talk to a base model or to adapters on it, and switch between them in the middle."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.screen import err, out, show_log

if TYPE_CHECKING:
    from lorakit.cli.conversation import Message, Speaker

HELP = "Talk to a base model or to adapters on it. /adapter NAME and /base switch in the middle; /help lists the rest."

COMMANDS = """/adapter NAME   go on with this adapter (without a name: list them)
/base           go on with the base model
/system TEXT    set the system message (without a text: remove it)
/clear          forget the conversation
/help           this list
/quit           leave (as does the end of input)"""


def chat(
    base: Annotated[str, typer.Argument(help="The base model: a hub name, a local folder or a GGUF file.")],
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "-a", help="An adapter folder; give several to switch between.")
    ] = None,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest reply in tokens.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="Number format: auto, bf16, fp16, fp32.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Hold the base in few bits: nf4, fp4, int8, ...")] = None,
) -> None:
    """Hold the conversation."""
    show_log(err)
    import torch

    from lorakit.cli.conversation import Speaker

    torch.manual_seed(seed)
    speaker = Speaker(base, adapter or [], dtype, quantize)
    conversation = Conversation(speaker, system)
    conversation.route = speaker.names[0] if speaker.names else None
    err.print(f"{base}, {conversation.voice} speaking. /help lists commands.", markup=False)
    for line in _lines(conversation):
        if not line.strip():
            continue
        if line.startswith("/"):
            if not conversation.command(line):
                break
            continue
        conversation.say(line, max_new_tokens, temperature, top_p)


class Conversation:
    """The messages so far, and who answers next."""

    def __init__(self, speaker: Speaker, system: str = "") -> None:
        self.speaker = speaker
        self.system = system
        self.messages: list[Message] = []
        self.route: str | None = None

    @property
    def voice(self) -> str:
        """Who answers, in words."""
        return f"adapter {self.route}" if self.route is not None else "the base model"

    def say(self, text: str, max_new_tokens: int, temperature: float, top_p: float) -> None:
        """One turn: the user's text, and the reply as it comes. An impossible turn leaves the conversation as
        it was."""
        from lorakit.cli.screen import fail
        from lorakit.errors import LorakitError

        turn: Message = {"role": "user", "content": text}
        head = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.speaker.encode([*head, *self.messages, turn])
        try:
            reply = self.speaker.speak(
                prompt,
                self.route,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                on_text=_write,
            )
        except LorakitError as error:
            fail(str(error))
            return
        except KeyboardInterrupt:  # a reply that goes on and on is cut, not the conversation
            _write("\n")
            return
        _write("\n")
        self.messages += [turn, {"role": "assistant", "content": reply}]

    def command(self, line: str) -> bool:
        """Carry out a /command; False when the conversation is over."""
        from lorakit.errors import LorakitError

        verb, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if verb in ("quit", "exit", "q"):
            return False
        if verb == "adapter" and not rest:
            out.print("adapters: " + (", ".join(self.speaker.names) or "none"), markup=False)
        elif verb == "adapter":
            try:
                self.route = self.speaker.check(rest)
            except LorakitError as error:
                err.print(str(error), markup=False)
            err.print(f"{self.voice} speaking", markup=False)
        elif verb == "base":
            self.route = None
            err.print(f"{self.voice} speaking", markup=False)
        elif verb == "system":
            self.system = rest
        elif verb == "clear":
            self.messages.clear()
        else:
            if verb != "help":
                err.print(f"there is no /{verb}; commands:", markup=False)
            out.print(COMMANDS, markup=False)
        return True


def _lines(conversation: Conversation) -> Iterator[str]:
    """Lines typed at a prompt that says who answers, or piped in."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and its editing, where the system has it
    while True:
        try:
            yield input(f"{conversation.route or 'base'}> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
