"""tunable(): a method parameter's default together with the range that a search may try."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class IntRange:
    low: int
    high: int
    log: bool = False


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


def tunable(default: Any, search: IntRange | Choice) -> Any:
    """A dataclass field with a default and a search range."""
    return dataclasses.field(default=default, metadata={"search": search})


def search_ranges(cls: Any) -> dict[str, IntRange | Choice]:
    """The tunable fields of a method class, by name."""
    return {f.name: f.metadata["search"] for f in dataclasses.fields(cls) if "search" in f.metadata}


def settings(method: Any) -> dict[str, Any]:
    """The parameters of a method object that differ from their defaults: what a policy file writes."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if getattr(method, f.name) != f.default}
