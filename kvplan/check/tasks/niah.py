"""One needle in a haystack."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case, Turn
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.words import keys, numbers, woven


def needle(key: str, number: str) -> str:
    return f"The secret number of the {key} is {number}."


def asked(key: str, number: str) -> Turn:
    """The question ends as the answer begins, so that a model without a chat template goes on with the number."""
    return Turn(f"What is the secret number of the {key}? The secret number of the {key} is", (number,))


@tasks.register("niah")
class Niah(Task):
    """One number said once somewhere in a story."""

    def case(self, rng: Random, size: int) -> Case:
        (key,), (number,) = keys(rng, 1), numbers(rng, 1)
        return Case(woven(rng, [needle(key, number)], size), (asked(key, number),), "substring")
