"""SnapKV: votes of the prompt's last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.evictors.base import Evictor, PromptView, Signal, evictors
from kvplan.methods.evictors.window import window_attention
from kvplan.methods.params import Choice, IntRange, tunable


@evictors.register("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV(Evictor):
    """Keep the tokens that the last queries of the prompt look at, and those queries' own tokens.

    Li et al. 2024, arXiv:2404.14469. Where the authors' code repeats KV heads first, we average the votes of a query
    group, so that each KV head keeps one set of tokens. The paper lets the cache grow while decoding; here a new
    token takes the slot of the lowest vote.

    Args:
        window_tokens: Prompt tokens, counted from the end, whose queries vote.
        pool_width: Tokens averaged (or maximised) around each vote. Odd; 1 turns pooling off.
        pooling: "avg" (the authors' class default) or "max" (their LongBench runs).

    Raises:
        MethodError: `pool_width` is even, or a parameter is out of range.
    """

    needs: ClassVar[Signal] = Signal.QUERIES
    window_tokens: int = tunable(32, IntRange(8, 128, log=True))
    pool_width: int = tunable(5, Choice(1, 5, 7, 13))
    pooling: Literal["avg", "max"] = tunable("avg", Choice("avg", "max"))

    def __post_init__(self) -> None:
        if self.pool_width < 1 or self.pool_width % 2 == 0:
            raise MethodError(f"snapkv.pool_width is {self.pool_width}; it must be odd (1 turns pooling off)")
        if self.window_tokens < 1:
            raise MethodError(f"snapkv.window_tokens is {self.window_tokens}; it must be at least 1")
        if self.pooling not in ("avg", "max"):
            raise MethodError(f"snapkv.pooling is '{self.pooling}'; it must be avg or max")

    @property
    def window_tokens_needed(self) -> int:
        return self.window_tokens

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: the pooled mean vote; the window's own tokens outrank every vote."""
        probs, _ = window_attention(view, self.window_tokens)
        W = probs.shape[3]
        votes = probs.mean((2, 3))  # [B, Hkv, T]
        votes[..., -W:] = 0  # the window's columns are kept anyway; their mass must not leak into its neighbours
        earlier = votes[..., :-W]
        if view.positions is not None:
            # Neighbours are neighbours in time.
            times = view.positions.masked_fill(~view.valid[:, None], -1)[..., :-W]
            order = times.expand_as(earlier).argsort(dim=-1, stable=True)
            pooled = torch.empty_like(earlier).scatter(-1, order, self._pooled(earlier.gather(-1, order)))
        else:
            pooled = self._pooled(earlier)
        return F.pad(pooled, (0, W), value=2.0)  # a mean of probabilities is at most 1

    def _pooled(self, votes: Tensor) -> Tensor:
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(votes, self.pool_width, 1, self.pool_width // 2) if votes.shape[-1] else votes
