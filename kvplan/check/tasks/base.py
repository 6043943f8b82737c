"""Task: generated contexts of any length with questions about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from random import Random
from typing import ClassVar

from kvplan.check.cases import Case
from kvplan.registry import Registry


class Task(ABC):
    """Makes cases in plain words and digits, which every tokenizer of a language model has."""

    name: ClassVar[str]
    least_size: ClassVar[int] = 1

    @abstractmethod
    def case(self, rng: Random, size: int) -> Case:
        """One case.

        Args:
            rng: Draws everything random in it.
            size: Sentences, words or examples that make the context long; `least_size` or more.
        """


tasks: Registry[Task] = Registry("task")
