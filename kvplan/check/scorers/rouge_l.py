"""ROUGE-L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.check.scorers.base import AnswerScorer, scorers


@scorers.register("rouge_l")
@dataclass(frozen=True)
class RougeL(AnswerScorer):
    """F-measure of the longest common subsequence of words, without stemming; the best over the answers."""

    means = "ROUGE-L"

    def score(self, text: str, references: Sequence[str]) -> float:
        from torchmetrics.functional.text import rouge_score

        found = rouge_score(text, [list(references)], accumulate="best", rouge_keys="rougeL")
        return float(found["rougeL_fmeasure"])
