"""Text to token ids, and token ids to text as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

from lorakit.files.prompt import Prompter
from lorakit.serve.http.bodies import Message
from lorakit.serve.http.faults import Fault, too_long

_PARTIAL = "\N{REPLACEMENT CHARACTER}"
T = TypeVar("T")

SECONDS = 5.0
"""For a chat template; real ones take milliseconds."""

CHARACTERS = 64
"""No text of more characters than this per token of the window is read into tokens: it could not fit."""


def encode_messages(prompter: Prompter, messages: Sequence[Message], window: int) -> list[int]:
    """A conversation in the form in which the adapter was trained, or the base model's own.

    Raises:
        Fault: the template refuses these messages (an order of roles that it does not know), or they are far too long.
    """
    check_length(sum(len(message.text) for message in messages), window)
    template = prompter.prompt.template or ""
    turns = []
    for message in messages:
        role = "system" if message.role == "developer" and "developer" not in template else message.role
        turn = {"role": role, "content": message.text}
        turns.append(turn | {"name": message.name} if message.name else turn)
    try:
        return limited(SECONDS, lambda: prompter.encode(turns))
    except Exception as problem:  # a template is a program of the model's: it may raise anything
        raise Fault(
            400, f"the model's chat template refuses these messages: {problem}", "template", "messages"
        ) from None


def encode_prompt(prompter: Prompter, prompt: str | list[int], window: int) -> list[int]:
    """A prompt of /v1/completions: text, or token ids as they are."""
    if isinstance(prompt, str):
        check_length(len(prompt), window)
        return prompter.raw(prompt)
    known = len(prompter.tokenizer)
    for one in prompt:
        if one >= known:
            raise Fault(
                400, f"prompt holds the token id {one}; this model has {known} tokens.", "unknown_token", "prompt"
            )
    return prompt


def limited(seconds: float, function: Callable[[], T]) -> T:
    """Call a function that renders a chat template, with a time limit: a template is a program, and that of an adapter a
    stranger's. Python cannot end a thread, so the template's own lines look at the clock.

    Raises:
        TimeoutError: it takes longer.
    """
    until = time.monotonic() + seconds

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > until:
            raise TimeoutError(f"it takes more than {seconds:.0f} s")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        return function()
    finally:
        sys.settrace(before)


def check_length(characters: int, window: int) -> None:
    """Refuse a text that cannot fit before time is spent on it."""
    if characters > CHARACTERS * window:
        raise too_long(
            f"the prompt has {characters:,} characters; this model reads {window:,} tokens, its answer included.",
            "messages",
        )


class TokenTexts:
    """Single tokens as OpenAI's log probabilities show them: a text, and the bytes behind it where they are known."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """The text and the bytes of a token. A token that is a part of a character has no text of its own."""
        if token not in self._known:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            whole = "\N{REPLACEMENT CHARACTER}" not in text
            self._known[token] = (text, list(text.encode("utf-8", "replace")) if whole else None)
        return self._known[token]


class Detokenizer:
    """One answer's text as its tokens come.

    A token may be a part of a character, or start what becomes a stop string: such text is held back until it is decided.
    What comes out adds up to the decoded answer, cut before the first stop string.

    Args:
        tokenizer: of the base model.
        stops: texts that end the answer and are no part of it.
        lazy: give everything at the end, in one decode; for answers that nobody reads before, without stop strings.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), lazy: bool = False) -> None:
        self.tokenizer, self.stops, self.lazy = tokenizer, tuple(stops), lazy and not stops
        self.stopped = False
        self._ids: list[int] = []
        # ids before `_from` are not looked at any more; those up to `_read` have been written
        self._from = self._read = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that has become certain with this token; `stopped` says whether a stop string has come."""
        self._ids.append(token)
        if self.lazy or self.stopped:
            return ""
        # A window that starts one piece earlier: decoders treat the first token of a text differently (its space).
        before = self._decode(self._ids[self._from : self._read])
        now = self._decode(self._ids[self._from :])
        if len(now) <= len(before) or now.endswith(_PARTIAL):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """What was held back; the answer has ended."""
        if self.stopped:
            return ""
        if self.lazy:
            return self._decode(self._ids)
        before = self._decode(self._ids[self._from : self._read])
        rest = self._decode(self._ids[self._from :])[len(before) :]
        text = self._release(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _release(self, text: str) -> str:
        """New text without what could still become a stop string."""
        if not self.stops:
            return text
        text = self._held + text
        found = [place for place in map(text.find, self.stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text could be the first of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
