"""F1 over words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.check.scorers.base import AnswerScorer, scorers
from kvplan.check.scorers.squad import squad


@scorers.register("f1")
@dataclass(frozen=True)
class F1(AnswerScorer):
    """F1 of the words that text and answer share, as SQuAD counts them; the best over the answers."""

    means = "F1 of words"

    def score(self, text: str, references: Sequence[str]) -> float:
        return squad(text, references)["f1"]
