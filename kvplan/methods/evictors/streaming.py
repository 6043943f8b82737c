"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplan.methods.evictors.base import Evictor, PromptView, evictors


@evictors.register("streaming")
@dataclass(frozen=True, kw_only=True)
class Streaming(Evictor):
    """Keep the layer's sink tokens and, of the rest, the most recent.

    Xiao et al. 2023, arXiv:2309.17453. Keys keep the rotation of their true position (the authors rotate by slot).
    """

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: the position."""
        B, Hkv, T, _ = view.keys.shape
        if view.positions is not None:
            return view.positions.float().expand(B, Hkv, T)
        return torch.arange(T, dtype=torch.float32, device=view.keys.device).expand(B, Hkv, T)
