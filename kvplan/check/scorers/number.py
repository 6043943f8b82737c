"""The number that a text comes to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.check.scorers.base import AnswerScorer, scorers

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARK = "####"  # before the result in GSM8K's solutions


@scorers.register("number")
@dataclass(frozen=True)
class Number(AnswerScorer):
    """1 when text and answer come to the same number: the one behind `####`, or else the last."""

    means = "the same number as result"

    def score(self, text: str, references: Sequence[str]) -> float:
        found = _result(text)
        return float(found is not None and any(found == _result(reference) for reference in references))


def _result(text: str) -> float | None:
    before, mark, after = text.partition(_MARK)
    # What a model goes on to write behind its result (another question, say) does not count.
    numbers = NUMBER.findall(after)[:1] if mark else NUMBER.findall(before)[-1:]
    return float(numbers[0].replace(",", "")) if numbers else None
