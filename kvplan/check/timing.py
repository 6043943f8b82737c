"""Times of things that are measured side by side: in turn, round after round, so that a busy moment hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes.

    On a CPU with one thread that is the thread's own CPU time, which other programs on the machine change least.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def in_turn(
    cases: Mapping[str, Callable[[], float]], rounds: int, progress: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Measure every case once a round; the first round warms up and is not counted.

    Args:
        cases: Each returns what it measured.
        progress: Called after each measurement.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, measure in cases.items():
            value = measure()
            if number:
                found[name].append(value)
            progress()
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of two cases that were measured in turn, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
