"""The gate's statistics: a mean loss over prompts against what it may be, looked at a few times. No torch here.

Three states, by a confidence interval against the limit: the whole interval above it is a regression, the whole
interval below it passes, anything else is inconclusive. Prompts come in looks of growing size, and the error rate is
spent over the looks, so that looking early costs no certainty.

Student's t for the intervals, not the bootstrap: on few prompts a percentile bootstrap is too narrow, and for a mean it
adds nothing. Either bound also counts one prompt that was not drawn, lost for the upper bound and unharmed for the
lower one: prompts that happen to be all alike would have an interval of width 0, and a few lost ones among many could
pass unseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np

# One-sided: at most so often is a policy judged wrongly that loses exactly as much as it may.
ALPHA = 0.05
FIRST_LOOK = 24
# Error is spent as the cube of the prompts seen (Kim and DeMets 1987): little early, most of it on the last look.
SPENDING_POWER = 3
NATS, SHARE, BYTES, RATIO = "nats", "share", "bytes", "ratio"


class State(StrEnum):
    PASS = "pass"
    REGRESSION = "regression"
    INCONCLUSIVE = "inconclusive"


def worst(states: Iterable[State]) -> State:
    """A regression outweighs what is open, and that outweighs a pass."""
    found = set(states)
    return next((s for s in (State.REGRESSION, State.INCONCLUSIVE) if s in found), State.PASS)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A mean loss that must not be above a limit.

    Attributes:
        name: For the report.
        losses: One a prompt; above 0 is worse.
        limit: The most that the mean may be.
        lost: What a prompt costs that is wholly lost.
        share: Of the error rate of false regressions; criteria that are many share one.
        unit: Of the losses.
        part: The task or way of asking that it is of, or None: all prompts.
        relative: A loss against the baseline, not against the full cache.
    """

    name: str
    losses: tuple[float, ...]
    limit: float
    lost: float
    share: float = 1.0
    unit: str = NATS
    part: str | None = None
    relative: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the gate says about one criterion.

    Attributes:
        prompts: How many it is judged on; 0 where the numbers are exact.
        value, low, high: The mean loss and its interval, or the exact number three times.
        part: See Criterion.
        full: Of bytes that are held to a share: those of a full cache.
        unchanged: The prompts gave the baseline's numbers again, which needs no interval.
    """

    name: str
    state: State
    prompts: int
    value: float
    low: float
    high: float
    limit: float
    unit: str
    part: str | None = None
    full: int | None = None
    unchanged: bool = False


def looks(total: int, first: int = FIRST_LOOK) -> list[int]:
    """How many prompts have been seen at each look: doubling, and all of them at the last.

    >>> looks(250)
    [24, 48, 96, 250]
    """
    made = []
    # A last step that is smaller than half of the one before would buy little.
    while first < total * 3 / 4:
        made.append(first)
        first *= 2
    return [*made, total]


def levels(seen: Sequence[int], alpha: float = ALPHA) -> list[float]:
    """The error rate that each look may spend; they add up to `alpha`."""
    spent = [alpha * (n / seen[-1]) ** SPENDING_POWER for n in seen]
    return [now - before for before, now in zip([0.0, *spent], spent, strict=False)]


def judge(criterion: Criterion, level: float) -> Finding:
    """One criterion at one look.

    Args:
        level: One-sided error rate of the look.
    """
    low = _bound([*criterion.losses, 0.0], level * criterion.share, upper=False)
    high = _bound([*criterion.losses, criterion.lost], level, upper=True)
    state = State.INCONCLUSIVE
    if low > criterion.limit:
        state = State.REGRESSION
    elif high <= criterion.limit:
        state = State.PASS
    value = float(np.mean(criterion.losses)) if criterion.losses else math.nan
    return Finding(
        name=criterion.name,
        state=state,
        prompts=len(criterion.losses),
        value=value,
        low=low,
        high=high,
        limit=criterion.limit,
        unit=criterion.unit,
        part=criterion.part,
    )


def _bound(values: Sequence[float], level: float, *, upper: bool) -> float:
    """One-sided confidence bound of the mean; infinite for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.inf if upper else -math.inf
    data = np.asarray(values, dtype=np.float64)
    mean, reach = float(data.mean()), _quantile(n - 1, level) * float(data.std(ddof=1)) / math.sqrt(n)
    return mean + reach if upper else mean - reach


@lru_cache(maxsize=4096)
def _quantile(freedom: int, level: float) -> float:
    """What Student's t exceeds with probability `level`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - level))
