"""Rankers of layer pairs that may share one cache. A new one is a file here and an import line below."""

from kvplan.search.sharing import kvsharer, similar
from kvplan.search.sharing.base import Pair, PairRanker, rankers, sharing_map

__all__ = ["Pair", "PairRanker", "kvsharer", "rankers", "sharing_map", "similar"]
