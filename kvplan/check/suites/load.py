"""suite_examples(): a suite's prompts, through `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvplan.calibrate.datasets_source import load_dataset_split
from kvplan.calibrate.examples import Example, Limits, to_example
from kvplan.check.suites.base import Suite, suites
from kvplan.errors import DataError

_GENERIC = ("validation", "test", "train")  # names of files that say nothing about what is in them


def suite_examples(
    text: str,
    tokenizer: Any,
    *,
    ways: Sequence[bool] = (False, True),
    samples: int | None = None,
    max_tokens: int | None = None,
    context_limit: int | None = None,
) -> list[Example]:
    """Read `NAME` (from the hub), `NAME:SUBSET` (likewise) or `NAME:FILE`.

    Args:
        ways: `question_aware`, false and true.
        samples: Most cases of the suite; each is asked in every way.
        max_tokens: Longest prompt; of a longer one the last tokens are kept.
        context_limit: Most tokens that the model can read.

    Raises:
        MethodError: there is no such suite.
        DataError: its data cannot be read, or is not as published.
    """
    name, _, source = text.partition(":")
    suite = suites[name]()
    if suite.only_aware and True not in ways:
        raise DataError(
            f"suite {name}: its prompts hold their questions, so they are question-aware; allow --question aware"
        )
    rows, subset = _rows(suite, source)
    where = f"suite {text}"
    limits = Limits(max_tokens, context_limit, 64)
    made: list[Example] = []
    for number, (task, case) in enumerate(suite.cases(rows, subset, where)):
        if number == samples:
            break
        for aware in (True,) if suite.only_aware else ways:
            way = "aware" if aware else "agnostic"
            record = case.record(f"{name}-{task}-{number}-{way}", task, f"{where}: case {number}", question_aware=aware)
            made.append(to_example(record, tokenizer, limits))
    if not made:
        raise DataError(f"{where}: asks nothing")
    return made


def _rows(suite: Suite, source: str) -> tuple[Any, str]:
    """The rows, and the name of what they are."""
    if source and Path(source).is_dir():
        raise DataError(f"suite {suite.name}: {source} is a folder; name a file in it")
    if Path(source).is_file():
        path = Path(source)
        return load_dataset_split(source), path.parent.name if path.stem in _GENERIC else path.stem
    if suite.hub is None or Path(source).suffix in (".jsonl", ".json", ".parquet", ".csv"):
        found = f"{source}: no such file" if source else "no file is named"
        raise DataError(f"suite {suite.name}: {found}; write --suite {suite.name}:FILE with a file of its format")
    subset = source or suite.subset
    return load_dataset_split(suite.hub, split="test", config=subset), str(subset)
