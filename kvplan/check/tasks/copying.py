"""A part of the text, word for word."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case, Turn
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.words import NAMES, THINGS, woven

WORDS = 8


@tasks.register("copying")
class Copying(Task):
    """What somebody said: eight words without sense, in their order."""

    def case(self, rng: Random, size: int) -> Case:
        names = rng.sample(NAMES, 4)
        said = {name: " ".join(rng.choice(THINGS) for _ in range(WORDS)) for name in names}
        wanted = rng.choice(names)
        context = woven(rng, [f"{name} said: {words}." for name, words in said.items()], size)
        return Case(context, (Turn(f"What did {wanted} say? {wanted} said:", (f"{said[wanted]}.",)),), "rouge_l")
