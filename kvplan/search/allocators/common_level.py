"""Layers that keep different shares of their tokens to lose equally much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvplan.calibrate.facts import Curve

BISECTIONS = 100


def shares_at_common_level(curves: Sequence[Curve], mean_share: float) -> list[float]:
    """The shares, with the given mean, at which all layers reach the same level.

    Args:
        curves: (level, share that reaches it) per layer, ascending, linear in between: from nothing at level 0 to
            everything at level 1.
        mean_share: 0 to 1.
    """
    closed = [((0.0, 0.0), *(point for point in curve if 0 < point[0] < 1), (1.0, 1.0)) for curve in curves]
    levels = [np.array([level for level, _ in curve]) for curve in closed]
    # Shares are means over prompts, and counts of whole tokens: a little noise may not make a curve fall.
    needed = [np.maximum.accumulate([min(share, 1.0) for _, share in curve]) for curve in closed]

    def shares(level: float) -> list[float]:
        return [float(np.interp(level, x, y)) for x, y in zip(levels, needed, strict=True)]

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if sum(shares(middle)) < mean_share * len(curves):
            low = middle
        else:
            high = middle
    found = shares(high)
    # Of what the last step left over each layer gets its part.
    factor = mean_share * len(curves) / sum(found)
    return [share * factor for share in found]
