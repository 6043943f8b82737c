"""BaKlaVa: more slots where attention heads change what goes through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvplan.calibrate.facts import LayerFacts
from kvplan.calibrate.groups import cluster_1d
from kvplan.errors import MethodError
from kvplan.search.allocators.base import Allocator, allocators


@allocators.register("baklava")
@dataclass(frozen=True, kw_only=True)
class BaKlaVa(Allocator):
    """Two classes of layers by how much their heads turn values; the lower one gets a part of the mean share.

    In the style of Gulhan et al. 2025, arXiv:2502.13176, which has no public code: parity is not claimed. A head
    matters by 1 - cosine between a token's value and the head's output there. The paper budgets each KV head; here the
    heads of a layer are averaged. Where the classes part, which the paper searches, is where they part best.

    Args:
        low_part: What the lower class keeps of the mean share.

    Raises:
        MethodError: `low_part` is not between 0 and 1.
    """

    title: ClassVar[str] = "BaKlaVa"
    reads: ClassVar[str] = "head_change"

    low_part: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.low_part <= 1:
            raise MethodError(f"baklava.low_part is {self.low_part}; it must be above 0 and at most 1")

    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        change = [facts.head_change for facts in layers if facts.head_change is not None]
        if len(set(change)) < 2:
            return [mean_share] * len(change)
        lower = [label == 0 for label in cluster_1d(change, 2)]
        low = mean_share * self.low_part
        high = (len(change) * mean_share - sum(lower) * low) / (len(change) - sum(lower))
        return [low if below else high for below in lower]
