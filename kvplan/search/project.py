"""Projection onto the memory target: the nearest split in the same proportions, in integers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction

from kvplan.errors import TargetError


def project(
    raw: Sequence[float], cost: Sequence[int], total: int, floor: Sequence[int], cap: Sequence[int]
) -> list[int]:
    """Scale `raw` by one common factor so that the split costs `total`: water filling between floors and caps.

    The factor is exact (rational arithmetic), so nothing depends on rounding; units that flooring freed go to the
    largest remainders, ties to the lower layer.

    Args:
        raw: Wished proportions, a number >= 0 per layer. A layer of weight 0 gets more than its floor only when all
            others are at their caps.
        cost: Bytes of one unit per layer, > 0.
        total: Bytes that may be spent.
        floor, cap: Bounds per layer in units.

    Returns:
        Units per layer, floor <= x <= cap, `sum(x * cost) <= total` with less than one affordable unit left over
        unless every layer is at its cap. Projecting the result again changes nothing.

    Raises:
        TargetError: the floors alone cost more than `total`.
    """
    layers = range(len(raw))
    least = sum(f * c for f, c in zip(floor, cost, strict=True))
    if least > total:
        raise TargetError(f"the smallest split costs {least} bytes; the target is {total} bytes")
    if sum(u * c for u, c in zip(cap, cost, strict=True)) <= total:
        return list(cap)
    highest = max(raw)
    # No weight is quite 0: what the others cannot use must go somewhere.
    weight = [max(Fraction(r), Fraction(highest) / 10**9) if highest > 0 else Fraction(1) for r in raw]
    factor = _factor(weight, cost, total, floor, cap)
    ideal = [min(max(weight[i] * factor, Fraction(floor[i])), Fraction(cap[i])) for i in layers]
    units = [int(x) for x in ideal]
    left = total - sum(u * c for u, c in zip(units, cost, strict=True))
    by_remainder = sorted(layers, key=lambda i: (units[i] - ideal[i], i))
    while True:
        fitting = [i for i in by_remainder if units[i] < cap[i] and cost[i] <= left]
        if not fitting:
            return units
        for i in fitting:
            if cost[i] <= left:
                units[i] += 1
                left -= cost[i]


def _factor(
    weight: list[Fraction], cost: Sequence[int], total: int, floor: Sequence[int], cap: Sequence[int]
) -> Fraction:
    """The factor at which the clipped split costs exactly `total`. Cost is piecewise linear and rising in it."""
    # Each layer is flat at its floor, then rises, then is flat at its cap.
    bends = [(Fraction(floor[i]) / w, cost[i] * w) for i, w in enumerate(weight)]
    bends += [(Fraction(cap[i]) / w, -cost[i] * w) for i, w in enumerate(weight)]
    heapq.heapify(bends)
    at, slope = Fraction(0), Fraction(0)
    spent = Fraction(sum(f * c for f, c in zip(floor, cost, strict=True)))
    while bends:
        bend, change = heapq.heappop(bends)
        if slope > 0 and spent + slope * (bend - at) >= total:
            return at + (total - spent) / slope
        spent += slope * (bend - at)
        at, slope = bend, slope + change
    return at
