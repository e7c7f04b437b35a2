"""Where the command line writes: results on stdout, everything about the work on stderr, so that pipes stay
clean."""

from __future__ import annotations

import logging
import sys

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


def show_log(console: Console, level: int = logging.INFO) -> None:
    """Send lorakit's log to the screen, and keep other libraries to their errors."""
    logger = logging.getLogger("lorakit")
    logger.handlers = [ScreenHandler(console)]
    logger.setLevel(level)
    logger.propagate = False
    from transformers.utils import logging as other

    other.set_verbosity_error()  # type: ignore[no-untyped-call]
    other.disable_progress_bar()  # type: ignore[no-untyped-call]
