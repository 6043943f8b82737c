"""Tables whose first column is text and whose others are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

MIN_PROMPTS = 5  # of a shown interval: a bootstrap over fewer is much too narrow, over one of no width


def number_table(headers: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> Table:
    """The first column to the left, the others to the right."""
    made = Table(title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0), box=SIMPLE_HEAD)
    for index, header in enumerate(headers):
        made.add_column(header, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        made.add_row(*row)
    return made
