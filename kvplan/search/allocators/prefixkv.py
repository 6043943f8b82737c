"""PrefixKV: every layer keeps the same part of its cumulated attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvplan.calibrate.facts import LayerFacts
from kvplan.search.allocators.base import Allocator, allocators
from kvplan.search.allocators.common_level import shares_at_common_level


@allocators.register("prefixkv")
@dataclass(frozen=True, kw_only=True)
class PrefixKV(Allocator):
    """As many tokens in each layer as hold one common part of the attention that its tokens receive in all.

    Wang et al. 2024, arXiv:2412.03409. Tokens are ranked by the attention of all heads and queries together; the
    profile keeps how many are needed for a few parts, from sampled queries. The authors sum over all queries of one
    prompt, accept being a few tokens off and may not end on equal layers; here the sum is exact.
    """

    title: ClassVar[str] = "PrefixKV"
    reads: ClassVar[str] = "prefix_curve"

    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        curves = [facts.prefix_curve for facts in layers if facts.prefix_curve is not None]
        return shares_at_common_level(curves, mean_share)
