"""`lorakit chat`: talk to a base model or to adapters on it, and switch between them in the middle."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from lorakit.cli.arguments import Adapters, Dtype, Model, Quantize, System
from lorakit.cli.conversation import Message, Sampling, Speaker, write
from lorakit.cli.flags import flags
from lorakit.cli.screen import err, fail, out, show_log
from lorakit.errors import LorakitError

HELP = "Talk to a base model or to adapters on it. /adapter NAME and /base switch in the middle; /help lists the rest."

COMMANDS = """/adapter NAME   switch to this adapter (without a name: list them)
/base           switch to the base model
/system TEXT    set the system message (without a text: remove it)
/clear          clear the conversation
/help           show this list
/quit           leave (or end of input)"""


@flags()
def chat(
    base: Model,
    adapter: Adapters = None,
    system: System = "",
    sampling: Sampling = Sampling(max_new_tokens=512, temperature=0.7, top_p=0.95),  # noqa: B008 - frozen
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Hold the conversation."""
    show_log(err)
    speaker = Speaker(base, adapter or [], dtype, quantize)
    speaker.seed(sampling.seed)
    conversation = Conversation(speaker, sampling, system)
    err.print(f"{base}: {conversation.voice} answers. /help lists the commands.", markup=False)
    for line in _lines(conversation):
        if line.startswith("/"):
            if not conversation.command(line):
                break
        elif line.strip():
            conversation.say(line)


class Conversation:
    """The messages so far, and who answers next."""

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str = "") -> None:
        self.speaker, self.sampling, self.system = speaker, sampling, system
        self.messages: list[Message] = []
        self.route: str | None = speaker.names[0] if speaker.names else None

    @property
    def voice(self) -> str:
        """Who answers, in words."""
        return f"adapter {self.route}" if self.route is not None else "the base model"

    def say(self, text: str) -> None:
        """One turn: the user's text, and the reply as it comes. An impossible turn leaves the conversation as it was."""
        turn: Message = {"role": "user", "content": text}
        head = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.speaker.encode([*head, *self.messages, turn], self.route)
        try:
            reply = self.speaker.speak(prompt, self.route, sampling=self.sampling, on_text=write)
        except LorakitError as error:
            fail(str(error))
            return
        except KeyboardInterrupt:  # a reply that goes on and on is cut, not the conversation
            write("\n")
            return
        write("\n")
        self.messages += [turn, {"role": "assistant", "content": reply}]

    def command(self, line: str) -> bool:
        """Carry out a /command; False when the conversation is over."""
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
            err.print(f"{self.voice} answers", markup=False)
        elif verb == "base":
            self.route = None
            err.print(f"{self.voice} answers", markup=False)
        elif verb == "system":
            self.system = rest
        elif verb == "clear":
            self.messages.clear()
        else:
            if verb != "help":
                err.print(f"unknown command /{verb}; commands:", markup=False)
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
            write("\n")
