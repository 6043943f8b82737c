"""HeadSplit: how a layer's slots are divided among its KV heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kvplan.registry import Registry


class HeadSplit(ABC):
    """Divides a layer's slots among its KV heads at the end of the prompt, from the evictor's scores."""

    name: ClassVar[str]

    @abstractmethod
    def split(self, scores: Tensor, total: int, least: int) -> list[int]:
        """Slots per KV head of one row.

        Args:
            scores: [Hkv, N] float32 scores of the prompt tokens that are not protected.
            total: Slots to give out, over all heads, for those tokens.
            least: Slots that every head gets at least; `least * Hkv <= total`.

        Returns:
            One integer per head: they sum to `total`, each is at least `least` and at most N.
        """


head_splits: Registry[HeadSplit] = Registry("head split")
