"""Case: a context and what is asked about it, before it is decided when the cache is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvplan.calibrate.examples import Example
from kvplan.calibrate.records import Message, Record

# More than the true answer has: a right answer may be put in more words.
EXTRA_TOKENS = 16


@dataclass(frozen=True)
class Turn:
    """A question and the texts that count as its answer; the first is the one that is predicted token by token."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """What a task or a suite asks.

    Attributes:
        context: What the cache holds when it is cut, in the question-agnostic way.
        turns: Asked one after the other; none: the text goes on freely.
        scorer: Judges the answers, by name.
        max_new_tokens: Of an answer; None: a little more than the true one has.
    """

    context: str
    turns: tuple[Turn, ...]
    scorer: str
    max_new_tokens: int | None = None

    def record(self, name: str, task: str, where: str, *, question_aware: bool) -> Record:
        """As prompts are read everywhere else; question-aware, the first question alone, inside the prompt."""
        given: dict[str, Any] = {
            "id": name,
            "task": task,
            "where": where,
            "scorer": self.scorer,
            "max_new_tokens": self.max_new_tokens,
        }
        if not self.turns:
            return Record(**given, prompt=self.context)
        turns = self.turns[:1] if question_aware else self.turns
        messages = [] if question_aware else [Message("user", self.context)]
        for turn in turns:
            asked = f"{self.context}\n\n{turn.question}" if question_aware else turn.question
            messages += [Message("user", asked.strip()), Message("assistant", turn.answers[0])]
        answers = turns[0].answers if len(turns) == 1 else ()
        return Record(**given, messages=tuple(messages), answers=answers, question_aware=question_aware)


def most_new_tokens(example: Example) -> int:
    """How much is generated for one answer at most."""
    if example.max_new_tokens is not None:
        return example.max_new_tokens
    return max((b - a for a, b in example.answers), default=len(example.continuation_ids)) + EXTRA_TOKENS


def length_generated(example: Example) -> int:
    """Tokens of the longest sequence while answers are generated: the last one follows all that was said before it."""
    before = max((a for a, _ in example.answers), default=0)
    return len(example.prompt_ids) + before + most_new_tokens(example)
