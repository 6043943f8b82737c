"""The words of a list that come most often."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case, Turn
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.words import COLORS, THINGS

COMMON, FACTOR = 2, 4


@tasks.register("aggregation")
class Aggregation(Task):
    """A list of words, two of which come four times as often as each of the others; asked: which?"""

    least_size = 30

    def case(self, rng: Random, size: int) -> Case:
        pool = rng.sample([*THINGS, *COLORS], 10)
        common, rare = pool[:COMMON], pool[COMMON:]
        round_ = [*common * FACTOR, *rare]
        words = (round_ * -(-size // len(round_)))[: max(size, len(round_))]
        rng.shuffle(words)
        turn = Turn("Which two words come most often in this list? The two words are", tuple(common))
        return Case(f"Here is a list of words: {', '.join(words)}.", (turn,), "all_substrings")
