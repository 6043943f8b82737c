"""PyramidKV: fewer slots in deeper layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvplan.calibrate.facts import LayerFacts
from kvplan.errors import MethodError
from kvplan.search.allocators.base import Allocator, allocators


@allocators.register("pyramid")
@dataclass(frozen=True, kw_only=True)
class Pyramid(Allocator):
    """An arithmetic sequence that falls from the first layer to the last.

    Cai et al. 2024, arXiv:2406.02069. The authors' integer steps overshoot the mean by up to 12 %; ours is exact.

    Args:
        beta: Steepness: the last layer keeps 1/beta of the mean. 1 is uniform.

    Raises:
        MethodError: `beta` is below 1.
    """

    title: ClassVar[str] = "PyramidKV"

    beta: int = 20

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise MethodError(f"pyramid.beta is {self.beta}; it must be at least 1")

    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        L = len(layers)
        if L == 1:
            return [mean_share]
        last = mean_share / self.beta
        first = 2 * mean_share - last
        if first > 1 >= mean_share:  # no layer can keep more than everything: flatten around the same mean
            first, last = 1.0, 2 * mean_share - 1
        return [first - (first - last) * i / (L - 1) for i in range(L)]
