"""SqueezeAttention: two budget levels over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvplan.calibrate.facts import LayerFacts
from kvplan.calibrate.groups import cluster_1d
from kvplan.errors import MethodError
from kvplan.search.allocators.base import Allocator, allocators


@allocators.register("squeeze")
@dataclass(frozen=True, kw_only=True)
class Squeeze(Allocator):
    """Cluster the layers by importance in three; squeeze the least important cluster, give the rest to the other two.

    Wang et al. 2024, arXiv:2404.04793. The authors cluster one prompt's cosines on the fly with an unseeded k-means; we
    cluster the mean over the profile's prompts, exactly.

    Args:
        squeezed_part: What the least important cluster keeps of the mean share. The authors' runs use 0.38 and 0.625.

    Raises:
        MethodError: `squeezed_part` is not between 0 and 1.
    """

    title: ClassVar[str] = "SqueezeAttention"
    reads: ClassVar[str] = "importance"

    squeezed_part: float = 0.38

    def __post_init__(self) -> None:
        if not 0 < self.squeezed_part <= 1:
            raise MethodError(f"squeeze.squeezed_part is {self.squeezed_part}; it must be above 0 and at most 1")

    def split(self, layers: Sequence[LayerFacts], mean_share: float) -> list[float]:
        importance = [facts.importance for facts in layers]
        L = len(importance)
        if len(set(importance)) < 2:
            return [mean_share] * L
        labels = cluster_1d(importance, min(3, len(set(importance))))
        squeezed = [label == 0 for label in labels]
        low = mean_share * self.squeezed_part
        high = (L * mean_share - sum(squeezed) * low) / (L - sum(squeezed))
        return [low if s else high for s in squeezed]
