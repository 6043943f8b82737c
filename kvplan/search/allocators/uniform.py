"""Uniform: every layer the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.search.allocators.base import Allocator, allocators


@allocators.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """The same share for every layer: what all others are measured by."""

    def split(self, importance: Sequence[float], mean_share: float) -> list[float]:
        return [mean_share] * len(importance)
