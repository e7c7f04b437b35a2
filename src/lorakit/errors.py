"""The one error that users see, and words that messages share.

Every message answers three questions: what was asked, what was found, what would work. The command line prints the
message alone; a traceback is for bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorakitError(ValueError):
    """Something asked of lorakit cannot be done; the message says what was asked, found, and what would work."""


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 row", "2,000 rows"; `many` for nouns that take more than an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def first_line(error: Exception) -> str:
    """An error's first line, which is what fits into another one's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    close = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f'; did you mean "{close[0]}"?' if close else "."
    listed = ", ".join(names) if names else "none"
    return LorakitError(f'unknown {kind} "{asked}"{place}{hint} Known: {listed}.')
