"""KVSharer: share between layers whose caches differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.search.sharing.base import Pair, PairRanker, rankers


@rankers.register("kvsharer")
@dataclass(frozen=True, kw_only=True)
class KVSharer(PairRanker):
    """Most distant pair first.

    Yang et al. 2024, arXiv:2410.18517, who find that sharing dissimilar caches hurts less than sharing similar ones.
    They accept a pair when the final hidden states stay close; here the study measures instead.
    """

    def rank(self, pair_distances: Sequence[tuple[int, int, float]]) -> list[Pair]:
        return [(i, j) for i, j, _ in sorted(pair_distances, key=lambda p: (-p[2], p[0], p[1]))]
