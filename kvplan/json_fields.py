"""Types of fields in files that kvplan reads back: what any number and any name must be, whoever wrote it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

LARGEST = 1e100  # sums of such numbers, and their squares, are still finite


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a character that cannot be printed")
    return text


Measure = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Name = Annotated[str, AfterValidator(_printable)]
