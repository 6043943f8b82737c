"""Scores of prompts and their uncertainty. Everything is paired: the same prompts under different policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


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
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(data.mean()), float(low), float(high))
