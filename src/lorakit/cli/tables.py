"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(first: str, *numbers: str, rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A plain table: names in the first column, numbers aligned to the right in the others."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    made.add_column(first, overflow="fold")
    for heading in numbers:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(*row)
    return made
