from __future__ import annotations

import io
import math
import re
from pathlib import Path

from rich.console import Console

from kvplan.check.comparison import Row
from kvplan.report.comparison import markdown, table
from kvplan.stats import Interval, PromptScores

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SHOWN = [line for line in README.splitlines() if re.match(r"\| .* MiB \|", line)]


def row(line: str, prompts: int = 90) -> Row:
    """What README shows, as the row that would be shown so."""
    name, held, share, score, kl, top1, worse = (cell.strip() for cell in line.strip("|").split("|"))
    size = round(float(held.split()[0]) * 2**20)
    numbers = [float(x) for x in re.findall(r"[+-]?\d+\.\d+", worse)]
    scores = PromptScores(*((float(x),) * prompts for x in (kl, top1, score)), (math.nan,) * prompts)
    full = round(size / float(share.rstrip("%")) * 100)
    return Row(name, size, full, scores, Interval(*numbers) if numbers else None)


ROWS = [row(line) for line in SHOWN]


def test_the_markdown_is_what_the_readme_shows() -> None:
    assert len(SHOWN) > 15
    assert markdown(ROWS).splitlines()[2:] == SHOWN


def test_the_table_fits_80_columns_with_the_same_digits() -> None:
    written = io.StringIO()
    screen = Console(width=200, file=written)
    screen.print(table(ROWS, "90 held-out prompts"))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    digits = [re.findall(r"[\d.]+", line) for line in lines if re.search(r"\d\.\d", line)]
    assert digits == [re.findall(r"[\d.]+", line) for line in SHOWN]


def test_few_prompts_have_no_interval() -> None:
    few = [row(SHOWN[2], prompts=4)]
    assert few[0].worse_by is not None
    assert markdown(few).splitlines()[-1].endswith("| +0.20 [-] |")
