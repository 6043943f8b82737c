"""AnswerScorer: how right a generated text is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvplan.registry import Registry

# Not in the registry, since it reads no text: every token of the answer is the likeliest, given the true ones before.
# That is so exactly when greedy decoding writes the answer, so nothing needs to be generated.
PREDICTED = "predicted"
PREDICTED_MEANS = "each token of the answer is the likeliest, as in greedy decoding"


class AnswerScorer(ABC):
    """Compares a generated text with the answers that count as right. `means`: what a score of 1 says, in few words."""

    name: ClassVar[str]
    means: ClassVar[str]

    @abstractmethod
    def score(self, text: str, references: Sequence[str]) -> float:
        """0 to 1.

        Args:
            text: What the model wrote.
            references: Texts that count as right, at least one.
        """


scorers: Registry[AnswerScorer] = Registry("scorer")


def meaning(name: str) -> str:
    """What a score of 1 says, also by `predicted`; the name itself where a newer kvplan knows more scorers."""
    if name == PREDICTED:
        return PREDICTED_MEANS
    return scorers[name].means if name in scorers else name


def first_line(text: str) -> str:
    """The first line with something in it: a model without a chat template goes on after its answer."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
