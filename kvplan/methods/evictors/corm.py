"""CORM: tokens that no recent query found important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.evictors.base import Evictor, PromptView, Signal, Step, evictors
from kvplan.methods.evictors.window import attention_blocks
from kvplan.methods.params import IntRange, tunable

# The score of position 0. A score of exactly 0 marks a slot just filled; no sum or difference can tell the two apart.
POSITION_ZERO = -torch.finfo(torch.float32).tiny


@evictors.register("corm")
@dataclass(frozen=True, kw_only=True)
class CORM(Evictor):
    """Drop the tokens that none of the last queries found important, even where there is room.

    Dai et al. 2024, arXiv:2404.15949. A token is important to a query that gives it at least the mean weight, one part
    in the tokens that the query sees. It is dropped once none of the last `window_tokens` queries found it important,
    so attention itself sets the size. The paper has no cap: here `slots` is one, and above it the token goes whose last
    importance lies furthest back. A token is important to a query group if it is to one of its heads. Tokens younger
    than `window_tokens` have not been seen by that many queries and stay (the paper keeps as many recent keys).

    The score is the position of the last query that found the token important. A token that none has stands one before
    its own position, so it too is judged by `window_tokens` queries. Positions count from the row's first real token.

    Args:
        window_tokens: Queries, the current one included, in which a token must matter at least once to stay.

    Raises:
        MethodError: `window_tokens` is below 1.
    """

    needs: ClassVar[Signal] = Signal.QUERIES
    keeps_scores: ClassVar[bool] = True
    window_tokens: int = tunable(256, IntRange(8, 512, log=True))

    def __post_init__(self) -> None:
        if self.window_tokens < 1:
            raise MethodError(f"corm.window_tokens is {self.window_tokens}; it must be at least 1")

    @property
    def window_tokens_needed(self) -> int:
        return self.window_tokens

    @property
    def forgets_after(self) -> int:
        """After the step at position `now`, a token with `now - score >= window_tokens` is dropped."""
        return self.window_tokens

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: where each token was last important; finite, never exactly 0."""
        B, Hkv, T, _ = view.keys.shape
        position = view.valid.cumsum(-1) - 1  # [B, T]
        last = (position - 1)[:, None].expand(B, Hkv, T).float()
        for start, stop, probs in attention_blocks(view, self.window_tokens):
            rows = position[:, None, start:stop, None].float()  # [B, 1, W, 1]
            important = probs.amax(2) >= 1 / (rows + 1)  # [B, Hkv, W, stop]; rows of padding have no mass
            seen_at = torch.where(important, rows, -torch.inf).amax(2)
            last = torch.cat([torch.maximum(last[..., :stop], seen_at), last[..., stop:]], -1)
        return _stamp(last)

    def observe(self, scores: Tensor, probs: Tensor, step: Step) -> Tensor:
        """The important move to the step; a new token is one before it. Slots that the query does not see stay."""
        most = probs.amax(2)  # [B, Hkv, S]
        now = step.now.float()
        new = (scores == 0) & (most > 0)
        unimportant = torch.where(new, _stamp(now - 1), scores)
        return torch.where(most >= 1 / step.held.float(), _stamp(now), unimportant)


def _stamp(position: Tensor) -> Tensor:
    return position.masked_fill(position == 0, POSITION_ZERO)
