"""Objective: what a search minimises, and the skills that it must not lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvplan.errors import StudyError
from kvplan.stats import PromptScores
from kvplan.units import parse_share

SMALLEST = 1e-9
# Weight of the mean KL in nats, and of the share of answers that are wrong. `task` breaks ties by KL.
WEIGHTS = {"kl": (1.0, 0.0), "task": (1e-3, 1.0), "mixed": (1.0, 1.0)}
GOALS = {
    "kl": "the smallest KL",
    "task": "the most right answers",
    "mixed": "the smallest KL plus share of wrong answers",
}


@dataclass(frozen=True)
class Objective:
    """The loss of a policy from its scores.

    Args:
        kind: `kl`: the mean KL from the full cache; `task`: the share of answers that are wrong; `mixed`: their sum.
        floors: Task -> smallest share of its answers that must be right, 0 to 1: an average hides a lost skill.
    """

    kind: str = "kl"
    floors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in WEIGHTS:
            raise StudyError(f"--objective {self.kind}: no such objective; choose among: {', '.join(WEIGHTS)}")

    @property
    def goal(self) -> str:
        """What makes a policy the best."""
        return GOALS[self.kind] + (", floors held," if self.floors else "")

    def check(self, tasks: Sequence[str], answered: Sequence[bool]) -> None:
        """Fail before long work.

        Args:
            tasks: Of each prompt.
            answered: Whether each prompt has an answer to be right or wrong about.

        Raises:
            StudyError: the prompts cannot tell what is asked for.
        """
        known = sorted({task for task, has in zip(tasks, answered, strict=True) if has})
        if not known and (self.kind != "kl" or self.floors):
            asked = f"--objective {self.kind}" if self.kind != "kl" else "--floor"
            todo = [*(["use --objective kl"] if self.kind != "kl" else []), *(["drop --floor"] if self.floors else [])]
            raise StudyError(f"{asked}: no prompt has an answer to be right about; {' and '.join(todo)}")
        if unknown := sorted(set(self.floors) - set(known)):
            raise StudyError(
                f"--floor {unknown[0]}: no prompt of that task has an answer; choose among: {', '.join(known)}"
            )

    def loss(self, scores: PromptScores) -> float:
        """Log of the weighted loss: it ranks alike, and KL spans decades, which a Gaussian process cannot follow."""
        kl, wrong = WEIGHTS[self.kind]
        lost = 1 - (scores.mean_task or 0.0) if wrong else 0.0
        total = kl * scores.mean_kl + wrong * lost
        return math.log(max(total, SMALLEST)) if math.isfinite(total) else math.nan

    def shortfalls(self, scores: PromptScores, tasks: Sequence[str]) -> dict[str, float]:
        """Task -> how far it is below its floor; <= 0 where the floor holds, nan where nothing could be scored.

        Args:
            tasks: Of each prompt of `scores`.
        """
        right = {
            task: [s for s, t in zip(scores.task, tasks, strict=True) if t == task and s == s] for task in self.floors
        }
        return {
            task: floor - float(np.mean(right[task])) if right[task] else math.nan
            for task, floor in self.floors.items()
        }

    def rank(self, scores: PromptScores, tasks: Sequence[str]) -> tuple[float, float]:
        """What sorts policies, best first: how much of the floors is missing, then the loss."""
        missing = sum(max(0.0, below) for below in self.shortfalls(scores, tasks).values())
        return (missing, self.loss(scores))

    def describe(self) -> dict[str, Any]:
        return {"objective": self.kind, "floors": dict(self.floors)}


@dataclass(frozen=True)
class Judge:
    """An objective together with the prompts' tasks.

    Args:
        tasks: Of every prompt, by index; may be empty without floors.
    """

    objective: Objective = Objective()
    tasks: Sequence[str] = ()

    def rank(self, scores: PromptScores, prompts: Sequence[int]) -> tuple[float, float]:
        """`Objective.rank` of scores on these prompts."""
        return self.objective.rank(scores, self._tasks(prompts))

    def shortfalls(self, scores: PromptScores, prompts: Sequence[int]) -> dict[str, float]:
        """`Objective.shortfalls` of scores on these prompts."""
        return self.objective.shortfalls(scores, self._tasks(prompts))

    def _tasks(self, prompts: Sequence[int]) -> list[str]:
        return [self.tasks[i] for i in prompts] if self.objective.floors else []


def parse_floors(texts: Sequence[str]) -> dict[str, float]:
    """From `fact=0.95` or `fact=95%`.

    Raises:
        StudyError: not of that form.
    """
    floors = {}
    for text in texts:
        task, apart, value = text.rpartition("=")
        try:
            if not (task and apart):
                raise ValueError
            floors[task] = parse_share(value) / 10_000
        except ValueError as error:  # a TargetError is one
            raise StudyError(f"--floor {text}: give a task and its share of right answers, like fact=0.95") from error
    return floors
