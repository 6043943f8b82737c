"""Tables whose first column is text and whose others are numbers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvplan.stats import MIN_PROMPTS, Interval

WIDTH = 80


def wrapped(line: str, width: int = WIDTH) -> str:
    """A line in lines of `width` columns; those after the first are indented. Words, which may be paths, stay whole."""
    if len(line) <= width:
        return line
    return textwrap.fill(
        line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )


def nats(value: float) -> str:
    """A KL in six characters, or seven with its sign: `0.0003`, `1.4089`, `12.340`."""
    shown = round(value, 4) + 0.0  # no -0.0000
    return f"{shown:.4f}" if abs(shown) < 10 else f"{shown:.3f}"


def interval(found: Interval, prompts: int) -> str:
    """`[0.0001, 0.0003]` of a KL, or a dash where so few prompts have none that says anything."""
    return "-" if prompts < MIN_PROMPTS else f"[{nats(found.low)}, {nats(found.high)}]"


def few_note(*counts: int) -> list[str]:
    """What the dash means, where one of the numbers of prompts leads to it."""
    return [f"-: fewer than {MIN_PROMPTS} prompts, too few for an interval."] if min(counts) < MIN_PROMPTS else []


def folded(name: str, width: int) -> str:
    """A name in lines of `width` columns, broken behind a sign where there is one; none of it is lost."""
    lines = [""]
    for part in re.findall(rf"[^:+/@,_ -]{{0,{width - 1}}}[:+/@,_ -]?", name):
        if len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def number_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], title: str, *, gap: int = 2, width: int | None = None
) -> Table:
    """The first column to the left, the others to the right, `gap` blanks between them.

    Args:
        width: Columns of the whole; texts of the first column are folded to fit.
    """
    if width is not None:
        rows = list(rows)
        others = [max(map(len, column)) for column in list(zip(headers, *rows, strict=True))[1:]]
        room = max(width - sum(others) - gap * len(others) - 2, len(headers[0]), 8)  # 2: the box's edges
        rows = [(folded(row[0], room), *row[1:]) for row in rows]
    made = Table(title=title, title_justify="left", pad_edge=False, padding=(0, gap - 1, 0, 0), box=SIMPLE_HEAD)
    for index, header in enumerate(headers):
        made.add_column(header, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        made.add_row(*row)
    return made
