"""A report in the terminal: the short form of every picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from kvplan.report.inputs import Inputs
from kvplan.report.plots import Plot, in_order

WIDTH = 80


def short_forms(inputs: Inputs) -> Text:
    """A heading and a few lines a picture, 80 columns wide, readable without colour."""
    text = Text()
    for plot, data in drawable(inputs):
        text.append(f"{plot.title}\n", "bold")
        text.append("\n".join(map(_wrapped, plot.short(data).splitlines())) + "\n\n")
    text.rstrip()
    return text


def drawable(inputs: Inputs) -> Sequence[tuple[Plot[Any], Any]]:
    """The pictures that these inputs suffice for, and their data."""
    found = [(plot, plot.data(inputs)) for plot in in_order()]
    return [(plot, data) for plot, data in found if data is not None]


def _wrapped(line: str) -> str:
    """Sentences in lines; rows of numbers and bars are short enough, or cannot be broken."""
    return line if len(line) <= WIDTH else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
