"""Similar: share between layers whose caches differ least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.search.sharing.base import Pair, PairRanker, rankers


@rankers.register("similar")
@dataclass(frozen=True, kw_only=True)
class Similar(PairRanker):
    """Closest pair first: what one would guess, and the control for KVSharer."""

    def rank(self, pair_distances: Sequence[tuple[int, int, float]]) -> list[Pair]:
        return [(i, j) for i, j, _ in sorted(pair_distances, key=lambda p: (p[2], p[0], p[1]))]
