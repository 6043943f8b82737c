"""Variables that are set to one another."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case, Turn
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.words import NAMES, numbers, woven

CHAINS, LENGTH = 3, 4


@tasks.register("variable_tracking")
class VariableTracking(Task):
    """Chains of people who have as many coins as the one before; asked: how many has the last of a chain?"""

    def case(self, rng: Random, size: int) -> Case:
        names = rng.sample(NAMES, CHAINS * LENGTH)
        chains = [names[i * LENGTH : (i + 1) * LENGTH] for i in range(CHAINS)]
        counts = numbers(rng, CHAINS)
        # Whoever is compared with must have been counted before.
        said = [f"{chain[0]} has {count} coins." for chain, count in zip(chains, counts, strict=True)]
        for step in range(1, LENGTH):
            said += [f"{chain[step]} has as many coins as {chain[step - 1]}." for chain in chains]
        wanted = rng.randrange(CHAINS)
        last = chains[wanted][-1]
        turn = Turn(f"How many coins does {last} have? {last} has", (counts[wanted],))
        return Case(woven(rng, said, size), (turn,), "substring")
