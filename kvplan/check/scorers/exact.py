"""Exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.check.scorers.base import AnswerScorer, first_line, scorers
from kvplan.check.scorers.squad import squad


@scorers.register("exact")
@dataclass(frozen=True)
class Exact(AnswerScorer):
    """1 when the first line is one of the answers, as SQuAD compares: without case, punctuation and articles."""

    means = "the first line is the answer"

    def score(self, text: str, references: Sequence[str]) -> float:
        return squad(first_line(text), references)["exact_match"]
