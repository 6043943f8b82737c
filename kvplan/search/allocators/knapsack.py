"""Knapsack: the best split and evictors if the damage of layers simply added up, from the profile alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvplan.search.budget import Budget
from kvplan.search.method import Method
from kvplan.units import BASIS_POINTS

Curve = Mapping[int, float]  # basis points of the prompt kept in one layer -> KL
NO_KL = 1e-9
GRID = 48
BINS = 4096


@dataclass(frozen=True)
class Choice:
    """What the knapsack picks for one layer: `units` as in `Budget`, and the KL that the profile promises."""

    method: str
    units: int
    kl: float


class Damage:
    """KL of a layer by what it keeps, between and beyond the measured shares.

    Between two measured shares log KL is linear in the share; from the largest to everything, KL is linear to what
    keeping everything costs: 0, or what the curve says (a codec rounds whatever is kept). Below
    the smallest measured share it grows at least in inverse proportion to the share, and at least as fast (in log-log)
    as between the two smallest: an unmeasured cut is never assumed to be cheap.
    """

    def __init__(self, curve: Curve) -> None:
        self._whole = curve.get(BASIS_POINTS, 0.0)
        self._shares = sorted(s for s in curve if s < BASIS_POINTS)
        # Noise may let a smaller share look better; keeping more never counts as worse than keeping less.
        kls = [max(curve[s] for s in self._shares[i:]) for i in range(len(self._shares))]
        self._kls = [max(k, NO_KL) for k in kls]
        self._logs = np.log(self._kls)

    def at(self, share: float) -> float:
        """KL at `share` basis points."""
        whole, shares, kls = self._whole, self._shares, self._kls
        if share >= BASIS_POINTS:
            return whole
        if share >= shares[-1]:
            return whole + max(kls[-1] - whole, 0.0) * (BASIS_POINTS - share) / (BASIS_POINTS - shares[-1])
        if share < shares[0]:
            power = 1.0
            if len(shares) > 1:
                power = max(power, math.log(kls[0] / kls[1]) / math.log(shares[1] / shares[0]))
            return kls[0] * (shares[0] / max(share, 1)) ** power
        return float(np.exp(np.interp(share, shares, self._logs)))


def kl_at(curve: Curve, share: float) -> float:
    """`Damage.at` of one share."""
    return Damage(curve).at(share)


def ranked_evictors(
    curves: Mapping[str, Mapping[int, Sequence[float]]], layers: Sequence[int], share: float
) -> list[str]:
    """The evictors by their summed KL over `layers` when each keeps `share` basis points, the smallest first."""

    def damage(evictor: str) -> float:
        return sum(kl_at({s: v[i] for s, v in curves[evictor].items()}, share) for i in layers)

    return sorted(sorted(curves), key=damage)


def solve(
    curves: Mapping[str, Mapping[int, Sequence[float]]],
    methods: Mapping[str, Method],
    budget: Budget,
    layers: Sequence[int],
) -> dict[int, Choice]:
    """Minimise the summed KL of `layers` under the budget: one method and one grid point per layer.

    Dynamic programming over bytes above the cheapest choice, in bins rounded up (so the answer always fits). KL curves
    have cliffs, which Lagrangian relaxation jumps over; the DP needs no convexity and is instant.

    Args:
        curves: `Profile.sensitivity`: evictor -> basis points -> KL per layer.
        methods: What to choose from, all of it with a curve.
        budget: The target; `budget.check` must have passed.
        layers: Layers that store a cache of their own.
    """
    options = {i: _options(curves, methods, budget, i) for i in layers}
    cheapest = {i: min(cost for cost, _ in options[i]) for i in layers}
    spare = budget.total - sum(cheapest.values())
    quantum = max(1, -(-spare // BINS))
    bins = spare // quantum + 1
    best = np.zeros(bins)
    picks: list[np.ndarray] = []
    for i in layers:
        totals = np.full((len(options[i]), bins), np.inf)
        for row, (cost, choice) in enumerate(options[i]):
            extra = -(-(cost - cheapest[i]) // quantum)
            if extra < bins:
                totals[row, extra:] = best[: bins - extra] + choice.kl
        picks.append(totals.argmin(0))
        best = totals.min(0)
    left, chosen = bins - 1, {}
    for i, pick in zip(reversed(layers), reversed(picks), strict=True):
        cost, chosen[i] = options[i][int(pick[left])]
        left -= -(-(cost - cheapest[i]) // quantum)
    return chosen


def _options(
    curves: Mapping[str, Mapping[int, Sequence[float]]], methods: Mapping[str, Method], budget: Budget, layer: int
) -> list[tuple[int, Choice]]:
    """(cost, choice) without those that another one beats in both."""
    found: list[tuple[int, Choice]] = []
    for name, method in methods.items():
        floor, cap = budget.floor(layer, method), budget.cap(layer, method)
        cost, fixed = budget.cost(layer, method), budget.fixed(layer, method)
        measured = {share: values[layer] for share, values in curves[name].items()}
        damage = Damage(measured)
        grid = {round(x) for x in np.geomspace(max(floor, 1), cap, GRID)}
        grid |= {share * budget.whole // BASIS_POINTS for share in measured if share < BASIS_POINTS}
        for units in sorted({min(max(x, floor), cap) for x in grid}):
            share = BASIS_POINTS if units == cap else units * BASIS_POINTS / budget.whole
            found.append((units * cost + fixed, Choice(name, units, damage.at(share))))
    found.sort(key=lambda option: (option[0], option[1].kl, option[1].method))
    kept: list[tuple[int, Choice]] = []
    for cost, choice in found:
        if not kept or choice.kl < kept[-1][1].kl:
            kept.append((cost, choice))
    return kept
