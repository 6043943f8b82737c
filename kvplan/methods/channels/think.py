"""ThinK: drop the key channels that the last queries use least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.channels.base import ChannelSelector, channel_selectors
from kvplan.methods.params import Choice, tunable


@channel_selectors.register("think")
@dataclass(frozen=True, kw_only=True)
class ThinK(ChannelSelector):
    """Drop the key channels that contribute least to the logits of the prompt's last queries.

    Xu et al. 2024, arXiv:2407.21018. A channel counts mean(q^2) * mean(k^2), which ranks like the norm of its part of
    the logits. Where the authors' code repeats KV heads and prunes per query head, we average q^2 over the query group,
    so that each KV head keeps one set of channels. Queries and keys are rotated; of a pair that rotates together one
    channel may go.

    Args:
        drop: Share of the key channels that are dropped, 0 up to 1 (excluded); rounded down to whole channels.
        recent: Most recent tokens whose keys stay whole.
        window: Prompt tokens, counted from the end, whose queries vote.

    Raises:
        MethodError: a parameter is out of range.
    """

    drop: float = tunable(0.4, Choice(0.2, 0.3, 0.4, 0.5))
    recent: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise MethodError(f"think.drop is {self.drop}; it must be at least 0 and below 1")
        for name in ("recent", "window"):
            if getattr(self, name) < 1:
                raise MethodError(f"think.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def recent_tokens(self) -> int:
        return self.recent

    @property
    def window_tokens_needed(self) -> int:
        return self.window

    def num_kept(self, dim: int) -> int:
        return dim - int(dim * self.drop)

    def select(self, queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        """Return [B, Hkv, num_kept(D)] int64. All queries that read one KV head lie side by side in `queries`.

        Ties go to the lower channel.
        """
        ranked = self.contributions(queries, keys, valid).sort(dim=-1, descending=True, stable=True).indices
        return ranked[..., : self.num_kept(keys.shape[-1])].sort(-1).values

    def contributions(self, queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        """[B, Hkv, D] float32: mean(q^2) over voting queries and their group, times mean(k^2) over the prompt."""
        queries = queries[:, :, -self.window :]
        per_head = _mean_square(queries, valid[:, -queries.shape[2] :])  # [B, Hq, D]
        asked = per_head.unflatten(1, (keys.shape[1], -1)).mean(2)  # [B, Hkv, D]
        return asked * _mean_square(keys, valid)


def _mean_square(x: Tensor, valid: Tensor) -> Tensor:
    """[B, H, T, D] over the valid T -> [B, H, D] float32."""
    real = valid[:, None, :, None]
    squares = torch.where(real, x.float().square(), 0.0)
    return squares.sum(2) / real.sum(2).clamp(min=1)
