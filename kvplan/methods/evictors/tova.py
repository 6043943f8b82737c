"""TOVA: token omission via attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvplan.methods.evictors.base import Evictor, PromptView, Signal, Step, evictors
from kvplan.methods.evictors.window import window_attention


@evictors.register("tova")
@dataclass(frozen=True, kw_only=True)
class TOVA(Evictor):
    """Drop the token that the last query looks at least, averaged over all heads of the layer.

    Oren et al. 2024, arXiv:2401.06104. One set of tokens for all KV heads. The paper attends over `n + 1` tokens, then
    drops one; a layer of `slots` here attends over `slots`, so the paper's `n` is `slots - 1`.
    """

    needs: ClassVar[Signal] = Signal.QUERIES
    keeps_scores: ClassVar[bool] = True
    one_set_for_all_heads: ClassVar[bool] = True

    @property
    def window_tokens_needed(self) -> int:
        return 1

    def score(self, view: PromptView) -> Tensor:
        """Return [B, 1, T] float32: the last query's attention."""
        probs, _ = window_attention(view, 1)
        return probs.mean((1, 2, 3))[:, None]

    def observe(self, scores: Tensor, probs: Tensor, step: Step) -> Tensor:
        return probs.mean((1, 2))[:, None]
