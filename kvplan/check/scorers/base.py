"""AnswerScorer: how right a generated text is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvplan.registry import Registry

# Not in the registry, since it reads no text: every token of the answer is the likeliest, given the true ones before.
# That is so exactly when greedy decoding writes the answer, so nothing needs to be generated.
PREDICTED = "predicted"


class AnswerScorer(ABC):
    """Compares a generated text with the answers that count as right."""

    name: ClassVar[str]

    @abstractmethod
    def score(self, text: str, references: Sequence[str]) -> float:
        """0 to 1.

        Args:
            text: What the model wrote.
            references: Texts that count as right, at least one.
        """


scorers: Registry[AnswerScorer] = Registry("scorer")


def first_line(text: str) -> str:
    """The first line with something in it: a model without a chat template goes on after its answer."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
