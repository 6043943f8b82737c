"""A rule that examples show."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case, Turn
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.words import COLORS, NAMES, THINGS


@tasks.register("few_shot")
class FewShot(Task):
    """Each thing has a color of its own, whoever brings it; the examples show which."""

    least_size = 2

    def case(self, rng: Random, size: int) -> Case:
        color_of = {thing: rng.choice(COLORS) for thing in THINGS}
        shown = [rng.choice(THINGS) for _ in range(size)]
        lines = [f"{rng.choice(NAMES)} has a {thing}. Color: {color_of[thing]}." for thing in shown]
        wanted = rng.choice(shown)
        turn = Turn(f"{rng.choice(NAMES)} has a {wanted}. Color:", (color_of[wanted],))
        return Case("\n".join(lines), (turn,), "substring")
