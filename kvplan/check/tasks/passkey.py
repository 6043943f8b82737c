"""A passkey in text that says the same over and over."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case, Turn
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.words import numbers

NOISE = "The cat sits. The dog runs. The day is long. The sea is big. All is well."


@tasks.register("passkey")
class Passkey(Task):
    """Four digits among repeated sentences, after Mohtashami and Jaggi 2023, arXiv:2305.16300."""

    def case(self, rng: Random, size: int) -> Case:
        (key,) = numbers(rng, 1)
        before = rng.randint(0, size)
        said = f"The pass key is {key}. Remember it. {key} is the pass key."
        context = " ".join([*[NOISE] * before, said, *[NOISE] * (size - before)])
        return Case(context, (Turn("What is the pass key? The pass key is", (key,)),), "substring")
