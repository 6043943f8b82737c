"""Allocator: how the slots are split over the layers, before the projection onto the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvplan.registry import Registry


class Allocator(ABC):
    """Splits a mean share over layers. Floors, caps and exact integers are the projection's business.

    `needs_importance`: whether the split goes by the layers' importance, so that a profile must be there.
    """

    name: ClassVar[str]
    needs_importance: ClassVar[bool] = False

    @abstractmethod
    def split(self, importance: Sequence[float], mean_share: float) -> list[float]:
        """A weight per layer, in order.

        Args:
            importance: Of each layer that has a budget; higher = more important.
            mean_share: What a uniform split would give each of them, 0 to 1.

        Returns:
            Shares >= 0 whose mean is `mean_share`; one may be above 1, which the projection clips and redistributes.
        """


allocators: Registry[Allocator] = Registry("allocator")
