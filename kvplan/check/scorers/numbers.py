"""Counts and paragraph numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.check.scorers.base import AnswerScorer, scorers


@scorers.register("numbers")
@dataclass(frozen=True)
class Numbers(AnswerScorer):
    """The share of the numbers in the text that are the answer's, so that naming them all earns little."""

    means = "share of the numbers that are right"

    def score(self, text: str, references: Sequence[str]) -> float:
        found = re.findall(r"\d+", text)
        wanted = {number for reference in references for number in re.findall(r"\d+", reference)}
        return sum(number in wanted for number in found) / len(found) if found else 0.0
