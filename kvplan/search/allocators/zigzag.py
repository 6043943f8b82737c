"""ZigZagKV: more slots where attention is spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvplan.calibrate.facts import LayerFacts
from kvplan.errors import MethodError
from kvplan.search.allocators.base import Allocator, allocators


@allocators.register("zigzag")
@dataclass(frozen=True, kw_only=True)
class ZigZag(Allocator):
    """A bound for every layer, and the rest in proportion to the tokens that hold 90 % of the attention.

    Zhong et al. 2024, ZigZagKV, arXiv:2412.09036. The authors count those tokens on one prompt, after all its layers,
    and per query head; here the profile's mean over prompts and KV heads counts.

    Args:
        bound: What every layer gets, as a part of the mean share.

    Raises:
        MethodError: `bound` is not between 0 and 1.
    """

    title: ClassVar[str] = "ZigZagKV"
    reads: ClassVar[str] = "mass_curve"
    MASS: ClassVar[float] = 0.9

    bound: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.bound <= 1:
            raise MethodError(f"zigzag.bound is {self.bound}; it must be between 0 and 1")

    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        curves = [facts.mass_curve for facts in layers if facts.mass_curve is not None]
        needed = [float(np.interp(self.MASS, [m for m, _ in curve], [n for _, n in curve])) for curve in curves]
        low, total = mean_share * self.bound, sum(needed)
        return [low + (mean_share - low) * len(needed) * n / total for n in needed]
