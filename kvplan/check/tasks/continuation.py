"""A long text that goes on freely."""

from __future__ import annotations

from random import Random

from kvplan.check.cases import Case
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.words import sentence

NEW_TOKENS = 128


@tasks.register("continuation")
class Continuation(Task):
    """A story, continued for 128 tokens; scored by how much of the full cache's own continuation comes back."""

    def case(self, rng: Random, size: int) -> Case:
        return Case(" ".join(sentence(rng) for _ in range(size)), (), "rouge_l", NEW_TOKENS)
