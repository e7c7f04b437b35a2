"""The one error that users see, and words that messages share.

Every message answers three questions: what was asked, what was found, what would work. The command line prints the
message alone; a traceback is for bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextvars import ContextVar
from itertools import takewhile

COMMAND_LINE: ContextVar[bool] = ContextVar("COMMAND_LINE", default=False)
"""Whether it is the command line that calls: its messages name flags where a program is told arguments."""


OTHERS = {"4bit": "nf4", "4-bit": "nf4", "int4": "nf4", "8bit": "int8", "8-bit": "int8", "fp8": "bf16", "half": "fp16"}
"""What other tools call some of our names, where the likest of ours would be the wrong one."""


class LorakitError(ValueError):
    """Something asked of lorakit cannot be done; the message says what was asked, found, and what would work."""


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 row", "2,000 rows"; `many` for nouns that take more than an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def first_line(error: Exception) -> str:
    """An error's first line, which is what fits into another one's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def advice(python: str, shell: str) -> str:
    """What would work, in the caller's language: for a program, or for the command line."""
    return shell if COMMAND_LINE.get() else python


def nearest(asked: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known names most like the one that was asked for, whatever their case; the likest first, and of equally like ones
    those that begin like it."""
    low = asked.lower()
    ratios = {str(name): difflib.SequenceMatcher(None, str(name).lower(), low).ratio() for name in known}

    def alike(name: str) -> int:
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name.lower(), low, strict=False)))

    order = sorted(ratios, key=lambda name: (-ratios[name], -alike(name)))
    return [name for name in order if ratios[name] >= cutoff][:count]


def unknown(kind: str, asked: str, known: Iterable[str], where: str | None = None) -> LorakitError:
    """The error for a name that is not in a list of known names, with the nearest one.

    Args:
        kind: what the name should be, e.g. "option", "adapter".
        asked: the name that was given.
        known: the names that exist.
        where: the file or place in which the name was given.
    """
    names = [str(name) for name in known]
    place = f" in {where}" if where else ""
    close = [OTHERS[low]] if (low := asked.lower()) in OTHERS and OTHERS[low] in names else nearest(asked, names)
    hint = f'; did you mean "{close[0]}"?' if close else "."
    listed = ", ".join(names) if names else "none"
    return LorakitError(f'unknown {kind} "{asked}"{place}{hint} Known: {listed}.')
