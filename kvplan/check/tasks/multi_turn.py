"""Several questions, one after the other, on one context that was cut before any of them."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.niah import asked, needle
from kvplan.check.tasks.words import keys, numbers, woven

NEEDLES, TURNS = 8, 4


@tasks.register("multi_turn")
class MultiTurn(Task):
    """Eight numbers in a story and four questions in turn (question-aware: the first alone)."""

    def case(self, rng: Random, size: int) -> Case:
        pairs = list(zip(keys(rng, NEEDLES), numbers(rng, NEEDLES), strict=True))
        turns = tuple(asked(*pair) for pair in rng.sample(pairs, TURNS))
        return Case(woven(rng, [needle(*pair) for pair in pairs], size), turns, "substring")
