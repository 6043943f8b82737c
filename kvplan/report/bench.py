"""What `kvplan bench` measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kvplan.check.bench import CUT, FULL, POOL, Measured
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


def notes(rows: Sequence[Measured]) -> list[str]:
    """What the caches are, in lines of at most 80 columns."""
    told = [
        f"{FULL}: transformers' full cache; x full and of full go by it.",
        f"{POOL}: every token, in kvplan's own pool instead of transformers' cache.",
        f"{CUT}: the last tokens, as many as the policy's bytes are worth;",
        "  every new token pushes the oldest out.",
    ]
    if any(row.share > 1 for row in rows):
        told.append("above 100%: growing layers hold room for the next tokens; full counts none.")
    return told
