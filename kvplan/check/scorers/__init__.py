"""Scorers of generated answers. A new one is a file here and an import line below."""

from kvplan.check.scorers import edit_similarity, exact, f1, number, numbers, rouge_l, substring
from kvplan.check.scorers.base import PREDICTED, AnswerScorer, meaning, scorers

__all__ = [
    "PREDICTED",
    "AnswerScorer",
    "edit_similarity",
    "exact",
    "f1",
    "meaning",
    "number",
    "numbers",
    "rouge_l",
    "scorers",
    "substring",
]
