"""Uniform: every layer the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvplan.calibrate.facts import LayerFacts
from kvplan.search.allocators.base import Allocator, allocators


@allocators.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """The same share for every layer: what all others are measured by."""

    title: ClassVar[str] = "uniform"

    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        return [mean_share] * len(layers)
