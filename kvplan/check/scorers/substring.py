"""Answers that occur somewhere in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.check.scorers.base import AnswerScorer, scorers


@scorers.register("substring")
@dataclass(frozen=True)
class Substring(AnswerScorer):
    """1 when one of the answers occurs in the text, whatever its case."""

    means = "the answer occurs in the text"

    def score(self, text: str, references: Sequence[str]) -> float:
        return float(any(_in(reference, text) for reference in references))


@scorers.register("all_substrings")
@dataclass(frozen=True)
class AllSubstrings(AnswerScorer):
    """The share of the answers that occur in the text, whatever their case; here all of them are asked for."""

    means = "share of the answers that occur in the text"

    def score(self, text: str, references: Sequence[str]) -> float:
        return sum(_in(reference, text) for reference in references) / len(references)


def _in(reference: str, text: str) -> bool:
    return reference.strip().casefold() in text.casefold()
