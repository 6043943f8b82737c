"""Allocator: how the slots are split over the layers, before the projection onto the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvplan.calibrate.facts import LayerFacts
from kvplan.registry import Registry


class Allocator(ABC):
    """Splits a mean share over layers. Floors, caps and exact integers are the projection's business.

    Attributes:
        title: The method's name in tables.
        reads: The field of `LayerFacts` that it cannot do without, or None.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads: ClassVar[str | None] = None

    @classmethod
    def usable(cls, layers: Sequence[LayerFacts]) -> bool:
        """Whether the profile tells what the allocator reads."""
        return cls.reads is None or all(getattr(facts, cls.reads) is not None for facts in layers)

    @abstractmethod
    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        """A weight per layer, in order.

        Args:
            layers: Each layer that has a budget.
            mean_share: What a uniform split would give each of them, 0 to 1.

        Returns:
            Shares >= 0 whose mean is `mean_share`; one may be above 1, which the projection clips and redistributes.
        """


allocators: Registry[Allocator] = Registry("allocator")
