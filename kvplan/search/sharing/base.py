"""PairRanker: which layers may read another layer's cache, best first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from kvplan.model_spec import ModelSpec
from kvplan.registry import Registry

Pair = tuple[int, int]  # (i, j): layer i reads layer j's cache, j < i


class PairRanker(ABC):
    """Orders the measured pairs."""

    name: ClassVar[str]

    @abstractmethod
    def rank(self, pair_distances: Sequence[tuple[int, int, float]]) -> list[Pair]:
        """The pairs, the one to share first in front; every pair once.

        Args:
            pair_distances: `(i, j, distance)` of the two layers' caches, i > j.
        """


def sharing_map(ranked: Iterable[Pair], spec: ModelSpec, num_shared: int) -> dict[int, int]:
    """Take the first pairs that fit until `num_shared` layers share; fewer when the ranking runs out.

    Chains collapse, as in KVSharer: where a pair's source itself reads a third layer, that third layer is the source;
    and when a source starts to share, its readers move on to its own source. So in the result no source shares. Both
    layers of a pair have the same shape and no sliding window.

    Returns:
        The source of each sharing layer.
    """
    source_of: dict[int, int] = {}
    for i, j in ranked:
        if len(source_of) >= num_shared:
            break
        source = source_of.get(j, j)
        same_shape = spec.layers[i] == spec.layers[source] and spec.layers[i].window is None
        if i not in source_of and source < i and same_shape:
            source_of = {k: source if s == i else s for k, s in source_of.items()} | {i: source}
    return source_of


rankers: Registry[PairRanker] = Registry("sharing ranker")
