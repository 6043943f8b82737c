"""The table that decides whether a policy is worth using."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kvplan.check.comparison import Row
from kvplan.report.tables import number_table
from kvplan.stats import MIN_PROMPTS
from kvplan.units import format_bytes

HEADERS = ("policy", "KV bytes", "of full", "score", "KL", "top-1", "KL above found")


def cells(row: Row) -> tuple[str, ...]:
    """One row as text."""
    task, worse = row.scores.mean_task, row.worse_by
    return (
        row.name,
        format_bytes(row.kv_bytes),
        f"{row.share:.1%}",
        "-" if task is None else f"{task:.3f}",
        f"{row.scores.mean_kl:.4f}",
        f"{row.scores.mean_top1:.3f}",
        "" if worse is None else f"{worse.mean:+.2f} {_bounds(row)}",
    )


def _bounds(row: Row) -> str:
    worse = row.worse_by
    return "[-]" if worse is None or len(row.scores) < MIN_PROMPTS else f"[{worse.low:.2f}, {worse.high:.2f}]"


def table(rows: Sequence[Row], title: str) -> Table:
    """Fits 80 columns: the bytes' unit, the same in all rows, is in the heading."""
    shown = [
        (name, f"{row.kv_bytes / 2**20:.2f}", *rest)
        for row, (name, _, *rest) in zip(rows, map(cells, rows), strict=True)
    ]
    return number_table(("policy", "KV MiB", *HEADERS[2:]), shown, title, gap=1)


def markdown(rows: Sequence[Row]) -> str:
    """The same table for a README."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|---|" + "---:|" * (len(HEADERS) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows])
