"""Groups of layers that are decided together: exact clustering of one number per layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cluster_1d(values: Sequence[float], k: int) -> list[int]:
    """Exact k-means of scalars: label per value, ascending by centroid.

    Sorted scalars have contiguous clusters, so dynamic programming finds the optimum in O(k n^2) and needs no seed. Of
    several optima it takes the one whose upper clusters begin latest. Fewer than `k` clusters come back when there are
    fewer distinct values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return []
    distinct, inverse = np.unique(data, return_inverse=True)  # equal values never part
    counts = np.bincount(inverse).astype(np.float64)
    n, k = len(distinct), max(1, min(k, len(distinct)))
    centred = distinct - data.mean()  # keeps the differences of sums below from cancelling
    weight = np.concatenate([[0.0], np.cumsum(counts)])
    total = np.concatenate([[0.0], np.cumsum(counts * centred)])
    squares = np.concatenate([[0.0], np.cumsum(counts * centred**2)])

    def cost(i: int, j: int) -> float:
        """Squared distances of distinct[i:j] to their mean."""
        return float(max(squares[j] - squares[i] - (total[j] - total[i]) ** 2 / (weight[j] - weight[i]), 0.0))

    best = np.full((k + 1, n + 1), np.inf)
    start = np.zeros((k + 1, n + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for c in range(1, k + 1):
        for j in range(c, n + 1):
            for i in range(c - 1, j):
                if (candidate := best[c - 1, i] + cost(i, j)) <= best[c, j]:
                    best[c, j], start[c, j] = candidate, i
    labels = np.zeros(n, dtype=np.int64)
    end = n
    for c in range(k, 0, -1):
        labels[start[c, end] : end] = c - 1
        end = start[c, end]
    return [int(label) for label in labels[inverse]]


def layer_groups(values: Sequence[float], max_groups: int = 4, *, min_silhouette: float = 0.5) -> list[list[int]]:
    """Layers in groups of alike values, ascending by value; the number of groups is that of the largest silhouette.

    One group when all values are equal, or when no split separates well (`min_silhouette`).
    """
    best = [list(range(len(values)))] if len(values) else []
    score = min_silhouette
    for k in range(2, min(max_groups, len(set(values))) + 1):
        labels = cluster_1d(values, k)
        if (candidate := _silhouette(values, labels)) > score + 1e-12:
            score = candidate
            best = [[i for i, label in enumerate(labels) if label == c] for c in range(k)]
    return best


def _silhouette(values: Sequence[float], labels: list[int]) -> float:
    """Mean silhouette: 1 is perfect, 0 no structure. A layer alone in its group counts 0, as usual."""
    data, label = np.asarray(values, dtype=np.float64), np.asarray(labels)
    distance = np.abs(data[:, None] - data[None])
    members = label[:, None] == np.unique(label)[None]  # [n, k]
    mean = distance @ members / members.sum(0)  # [n, k] mean distance to each group
    size = members.sum(0)[label]
    inside = mean[np.arange(len(data)), label] * size / np.maximum(size - 1, 1)
    mean[np.arange(len(data)), label] = np.inf
    outside = mean.min(1)
    widest = np.maximum(inside, outside)
    scores = np.where((size > 1) & (widest > 0), (outside - inside) / np.where(widest > 0, widest, 1.0), 0.0)
    return float(scores.mean())
