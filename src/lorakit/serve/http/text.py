"""Token ids as text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PARTIAL = "\N{REPLACEMENT CHARACTER}"


class Writer:
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
