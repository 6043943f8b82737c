"""What is wrong with a policy file, as (path, message, is the key to blame)."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kvplan.registry import unknown

_WORDS = {
    "Input should be": "must be",
    "a valid integer": "an integer",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


class Problems(ValueError):
    """Problems below the value that is being validated, each with its path from there."""

    def __init__(self, problems: list[tuple[tuple[Any, ...], str, bool]]) -> None:
        self.problems = problems
        super().__init__(problems)


def explain(error: ValidationError, known: Any) -> list[tuple[tuple[Any, ...], str, bool]]:
    """pydantic's errors as (path, message, is the key to blame). `known(path)` gives a key's kind and siblings."""
    found: list[tuple[tuple[Any, ...], str, bool]] = []
    for e in error.errors(include_url=False):
        path, cause = tuple(e["loc"]), e.get("ctx", {}).get("error")
        if isinstance(cause, Problems):
            found += [((*path, *below), told, at_key) for below, told, at_key in cause.problems]
        elif e["type"] == "extra_forbidden":
            kind, names = known(path)
            told = unknown(kind, str(path[-1]), names) if names else f"unknown {kind} '{path[-1]}' (it has none)"
            found.append((path, told, True))
        elif e["type"] == "missing":
            found.append((path, "is required", False))
        elif e["type"] in ("model_type", "dict_type", "model_attributes_type"):
            found.append((path, f"must be a mapping, not {e['input']!r}", False))
        elif isinstance(cause, ValueError):
            found.append((path, str(cause), False))
        else:
            told = e["msg"]
            for theirs, ours in _WORDS.items():
                told = told.replace(theirs, ours)
            found.append((path, f"{told}, not {e['input']!r}", False))
    return found
