"""DBudgetKV: every layer loses the same part of the norm of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvplan.calibrate.facts import LayerFacts
from kvplan.search.allocators.base import Allocator, allocators
from kvplan.search.allocators.common_level import shares_at_common_level


@allocators.register("dbudget")
@dataclass(frozen=True, kw_only=True)
class DBudget(Allocator):
    """As many tokens in each layer as keep one common part of the L2 norm of a query's attention, mean over heads.

    Ni et al. 2025, DBudgetKV, renamed ReFreeKV, arXiv:2502.16886. The authors fix the norm that may be lost (5 %) and
    let each prompt and layer keep what that needs. A plan has a target instead: here the loss is the one, the same in
    all layers, at which the target is met. Their tokens are ranked by the last eight queries, here by the query itself.
    """

    title: ClassVar[str] = "DBudgetKV"
    reads: ClassVar[str] = "norm_curve"

    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        curves = [facts.norm_curve for facts in layers if facts.norm_curve is not None]
        return shares_at_common_level(curves, mean_share)
