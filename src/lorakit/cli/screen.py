"""Where the command line writes: results on stdout, everything about the work on stderr, so that pipes stay
clean."""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

# A pipe has no width: a table there is as wide as it is, rather than cut at 80 columns.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
"""Results: tables, answers, JSON."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""What is being done, warnings, errors."""


def fail(message: str) -> None:
    """Print an error for a person: one message, no traceback, nothing in it read as markup."""
    text = Text("lorakit: ", style="bold red")
    text.append(message, style="default")
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


class ScreenHandler(logging.Handler):
    """Log records as lines on stderr, above a progress bar if there is one; warnings stand out."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        style = "yellow" if record.levelno >= logging.WARNING else "dim" if record.levelno < logging.INFO else ""
        self.console.print(Text(record.getMessage(), style=style))


def log_to(console: Console, level: int = logging.INFO) -> None:
    """Send lorakit's log to the screen."""
    logger = logging.getLogger("lorakit")
    logger.handlers = [ScreenHandler(console)]
    logger.setLevel(level)
    logger.propagate = False


def show_log(console: Console, level: int = logging.INFO) -> None:
    """Send lorakit's log to the screen, and keep other libraries to their errors. Imports transformers, which takes seconds."""
    log_to(console, level)
    from transformers.utils import logging as other

    other.set_verbosity_error()  # type: ignore[no-untyped-call]
    other.disable_progress_bar()  # type: ignore[no-untyped-call]


def width() -> int:
    """The columns to wrap at: those of the terminal, or COLUMNS; a pipe gets long lines, which are easier to search."""
    return min(shutil.get_terminal_size((160, 24)).columns, 160)


def two_columns(rows: Iterable[Sequence[str]], columns: int) -> str:
    """Pairs of a short text and a long one as lines of at most `columns`, the long ones wrapped beside the short."""
    pairs = list(rows)
    left = max((len(short) for short, _ in pairs), default=0) + 4
    lines = []
    for short, long in pairs:
        body = textwrap.wrap(long, max(columns - left, 24), break_on_hyphens=False) or [""]
        lines.append(f"  {short}".ljust(left) + body[0])
        lines += [" " * left + line for line in body[1:]]
    return "\n".join(line.rstrip() for line in lines)
