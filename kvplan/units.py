"""Bytes and shares as people write them."""

from __future__ import annotations

import re

from kvplan.errors import TargetError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
BASIS_POINTS = 10_000


def is_size(text: str) -> bool:
    """Whether `text` is meant as a size, well written or not: a number with letters after it, or a unit alone."""
    return re.fullmatch(r"\s*[\d.,]+\s*[A-Za-z]+\s*", text) is not None or text.strip().upper() in _UNITS


def parse_bytes(text: str) -> int:
    """'512MiB' -> 536870912.

    Raises:
        TargetError: not a number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE)
    if not match or match[2].upper() not in _UNITS:
        raise TargetError(f"'{text}' is not a size; write for example 512MiB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """1572864 -> '1.50 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def parse_share(text: str) -> int:
    """'40%' or '0.4' -> 4000 basis points; integers, so that no 0.1 + 0.2 decides whether a plan fits.

    Raises:
        TargetError: not a share above 0 and at most 100 %.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if not match:
        raise TargetError(f"'{text}' is not a share; write for example 40% or 0.4")
    share = round(float(match[1]) * (100 if match[2] else BASIS_POINTS))
    if not 0 < share <= BASIS_POINTS:
        meant = f"; did you mean {match[1]}%?" if not match[2] and 0 < float(match[1]) <= 100 else ""
        raise TargetError(f"'{text}' is not a share above 0% and at most 100%{meant}")
    return share


def format_share(basis_points: int) -> str:
    """4000 -> '40%', 3725 -> '37.25%'."""
    return f"{basis_points / 100:.2f}".rstrip("0").rstrip(".") + "%"
