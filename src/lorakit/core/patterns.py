"""Regular expressions over the names of layers. Files bring them, and a file may be a stranger's: matching one has a time
limit, without which an expression of a dozen characters can run for years."""

from __future__ import annotations

import functools

import regex

from lorakit.errors import LorakitError

SECONDS = 0.2
"""For one name; sound expressions take microseconds."""

LONGEST = 10_000
"""Characters of an expression."""


@functools.lru_cache(4096)  # the library's own look-up takes three times as long as a match
def _compiled(pattern: str) -> regex.Pattern[str] | str:
    if len(pattern) > LONGEST:
        return f"it has {len(pattern):,} characters, {LONGEST:,} at most"
    try:
        return regex.compile(pattern)
    except regex.error as problem:
        return str(problem)


def mistake(pattern: str) -> str:
    """What is wrong with an expression, or an empty text."""
    found = _compiled(pattern)
    return found if isinstance(found, str) else ""


def matches(pattern: str, name: str, *, whole: bool = True) -> bool:
    """Whether an expression matches a name, whole or from its beginning on.

    Raises:
        LorakitError: it is no expression, or matching takes too long.
    """
    return match(pattern, name, whole=whole) is not None


def match(pattern: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
    """As `matches`, the match itself."""
    found = _compiled(pattern)
    if isinstance(found, str):
        raise LorakitError(f"{pattern[:200]!r} is no regular expression ({found}).")
    try:
        return (found.fullmatch if whole else found.match)(name, timeout=SECONDS)
    except TimeoutError:
        raise LorakitError(
            f"the regular expression {pattern[:200]!r} takes more than {SECONDS} s to be matched with the name {name}: it has "
            "repetitions within repetitions. Name the layers, or write it without."
        ) from None
