"""Types of fields in files that kvplan reads back: what any number and any name must be, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field

LARGEST = 1e100  # sums of such numbers, and their squares, are still finite


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a character that cannot be printed")
    return text


def _printable_throughout(settings: dict[str, Any]) -> dict[str, Any]:
    for text in _texts(settings):
        _printable(text)
    return settings


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])


Measure = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, AfterValidator(_printable)]
Settings = Annotated[dict[str, Any], AfterValidator(_printable_throughout)]
