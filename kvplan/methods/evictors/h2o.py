"""H2O: heavy hitters by accumulated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvplan.methods.evictors.base import Evictor, PromptView, Signal, Step, evictors


@evictors.register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O(Evictor):
    """Keep the tokens that have received the most attention so far; the layer's recent window is the local half.

    Zhang et al. 2023, arXiv:2306.14048, as in the authors' real-drop class: scores are sums, never normalised. Their
    code scores query heads; we average a query group, so that each KV head keeps one set of tokens.
    """

    needs: ClassVar[Signal] = Signal.COLUMN_SUMS
    keeps_scores: ClassVar[bool] = True

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: attention mass received from the prompt's queries."""
        assert view.column_sums is not None
        return view.column_sums

    def observe(self, scores: Tensor, probs: Tensor, step: Step) -> Tensor:
        return scores.add(probs.sum(2), alpha=1 / probs.shape[2])
