"""One needle among others that look alike."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.niah import asked, needle
from kvplan.check.tasks.words import keys, numbers, woven

NEEDLES = 8


@tasks.register("niah_multikey")
class NiahMultikey(Task):
    """Eight numbers of eight things in a story; one of them is asked for."""

    def case(self, rng: Random, size: int) -> Case:
        pairs = list(zip(keys(rng, NEEDLES), numbers(rng, NEEDLES), strict=True))
        wanted = rng.choice(pairs)
        return Case(woven(rng, [needle(*pair) for pair in pairs], size), (asked(*wanted),), "substring")
