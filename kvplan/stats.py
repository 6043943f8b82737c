"""Scores of prompts and their uncertainty. Everything is paired: the same prompts under different policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_PROMPTS = 5  # of a stated interval: a bootstrap over fewer is much too narrow, over one of no width


NOTHING = 1e-12  # a score that is as good as 0


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def bounds(self, prompts: int) -> tuple[float, float] | None:
        """What may be stated of it: None where it is over too few prompts to say anything."""
        return (self.low, self.high) if prompts >= MIN_PROMPTS else None

    def stated(self, prompts: int) -> tuple[float, float | None, float | None]:
        """Mean, low and high; the last two as `bounds` has them."""
        return (self.mean, *(self.bounds(prompts) or (None, None)))


@dataclass(frozen=True)
class PromptScores:
    """What one policy did to each prompt, against the full cache; one entry per prompt.

    Attributes:
        kl: mean KL(full || policy) in nats over the next-token distributions of the continuation.
        top1: share of the continuation's tokens at which both caches predict the same next token.
        task: share of the prompt's answers predicted exactly, or nan where a prompt has no answer.
        nll: mean negative log-likelihood of the continuation in nats.
    """

    kl: tuple[float, ...]
    top1: tuple[float, ...]
    task: tuple[float, ...]
    nll: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.kl)

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))

    @property
    def mean_top1(self) -> float:
        return float(np.mean(self.top1))

    @property
    def mean_task(self) -> float | None:
        scored = [t for t in self.task if t == t]
        return float(np.mean(scored)) if scored else None


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Percentile bootstrap of the mean over prompts. For a paired comparison pass the differences."""
    data = np.asarray(values, dtype=np.float64)
    means = data[_draws(len(data), seed, resamples)].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(data.mean()), float(low), float(high))


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], *, seed: int = 0, resamples: int = 2000
) -> Interval | None:
    """Percentile bootstrap of mean(above) / mean(below) over prompts, paired: both are drawn together.

    Returns:
        None when `below` is `NOTHING` on average. Draws in which it is have no ratio and are left out.
    """
    upper, lower = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    drawn = _draws(len(lower), seed, resamples)
    tops, bottoms = upper[drawn].mean(1), lower[drawn].mean(1)
    ratios = tops[bottoms > NOTHING] / bottoms[bottoms > NOTHING]
    if lower.mean() <= NOTHING or not len(ratios):
        return None
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(float(upper.mean() / lower.mean()), float(low), float(high))


def _draws(size: int, seed: int, resamples: int) -> Any:
    """[resamples, size] int64: which prompts each resample holds."""
    return np.random.default_rng(seed).integers(0, size, (resamples, size))
