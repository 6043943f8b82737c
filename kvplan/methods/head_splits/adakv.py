"""Ada-KV: slots go to the heads whose tokens score highest in the layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.head_splits.base import HeadSplit, head_splits
from kvplan.methods.params import Choice, tunable


@head_splits.register("adakv")
@dataclass(frozen=True, kw_only=True)
class AdaKV(HeadSplit):
    """Give each head as many slots as it has tokens among the layer's highest scores, blended with an even split.

    Feng et al. 2024, arXiv:2407.11550. The blend is that of the authors' code, where `floor` weighs the even part (the
    paper's alpha weighs the other one). Their rounding loses or gains slots; here the sum is exact, by largest
    remainder. They split over query heads unless told otherwise; here over KV heads, on scores whose query group the
    evictor has reduced. Scores are compared across heads as they are, without normalising.

    Args:
        floor: Share of the even split that each head keeps, 0 to 1: 0 follows the scores alone, 1 splits evenly.

    Raises:
        MethodError: `floor` is out of range.
    """

    floor: float = tunable(0.2, Choice(0.0, 0.2, 0.5))

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise MethodError(f"adakv.floor is {self.floor}; it must be between 0 and 1")

    def split(self, scores: Tensor, total: int, least: int) -> list[int]:
        """Ties in the scores go to the later token, then to the lower head; ties in a remainder to the lower head."""
        num_heads, N = scores.shape
        assert least * num_heads <= total <= num_heads * N
        # Latest token first and heads side by side, so that a stable sort breaks ties as promised.
        ranked = scores.flip(-1).T.flatten().sort(descending=True, stable=True).indices[:total]
        counts = (ranked % num_heads).bincount(minlength=num_heads).tolist()
        even = total / num_heads
        ideal = [count * (1 - self.floor) + even * self.floor for count in counts]
        return _exact(ideal, total, low=max(least, math.floor(even * self.floor + 1e-9)), high=N)


def _exact(ideal: list[float], total: int, low: int, high: int) -> list[int]:
    """Integers of sum `total` in proportion to `ideal`, which sums to `total` as well, each in `low` to `high`."""
    heads = range(len(ideal))
    raised: set[int] = set()
    shares = list(ideal)
    # What the heads below `low` lack comes from the others, which may push further heads below it.
    while below := {h for h in heads if h not in raised and shares[h] < low}:
        raised |= below
        weight = sum(ideal[h] for h in heads if h not in raised)
        room = total - low * len(raised)
        shares = [float(low) if h in raised else ideal[h] * room / weight for h in heads]
    whole = [min(high, max(low, math.floor(share + 1e-9))) for share in shares]
    for _ in range(total - sum(whole)):
        head = max((h for h in heads if whole[h] < high), key=lambda h: (round(shares[h] - whole[h], 9), -h))
        whole[head] += 1
    return whole
