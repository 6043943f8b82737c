"""Key norm: a cheap stand-in for attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvplan.methods.evictors.base import Evictor, PromptView, evictors


@evictors.register("knorm")
@dataclass(frozen=True, kw_only=True)
class KeyNorm(Evictor):
    """Keep the tokens whose keys have the smallest L2 norm.

    Devoto et al. 2024, arXiv:2406.11430. On models that normalise keys (Qwen3, Gemma 3) norms say little.
    """

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: minus the norm."""
        return -view.keys.float().norm(dim=-1)
