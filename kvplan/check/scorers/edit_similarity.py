"""Similarity of code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from kvplan.check.scorers.base import AnswerScorer, scorers

_NO_CODE = ("#", "//", "```")


@scorers.register("edit_similarity")
@dataclass(frozen=True)
class EditSimilarity(AnswerScorer):
    """How alike the first line of code and the answer are: difflib's ratio, the best over the answers."""

    means = "likeness of the first line of code"

    def score(self, text: str, references: Sequence[str]) -> float:
        lines = (line.strip() for line in text.splitlines())
        line = next((line for line in lines if line and not line.startswith(_NO_CODE)), "")
        return max(SequenceMatcher(None, line, reference.strip()).ratio() for reference in references)
