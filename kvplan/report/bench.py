"""What `kvplan bench` measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kvplan.check.bench import Measured
from kvplan.report.tables import number_table
from kvplan.units import format_bytes

HEADERS = ("cache", "tokens/s", "x full", "KV held", "of full")


def cells(row: Measured) -> tuple[str, ...]:
    """One row as text; quartiles in brackets."""
    rate = row.tokens_per_second
    digits = 0 if rate.median >= 100 else 1
    return (row.name, rate.text(digits), row.speedup.text(), format_bytes(row.kv_bytes), f"{row.share:.1%}")


def table(rows: Sequence[Measured], title: str) -> Table:
    """Fits a terminal of 80 columns."""
    return number_table(HEADERS, map(cells, rows), title)
