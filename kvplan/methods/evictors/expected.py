"""Expected Attention: what the queries to come will look at, from the statistics of those that came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.evictors.base import Evictor, PromptView, Signal, evictors
from kvplan.methods.params import Choice, IntRange, tunable
from kvplan.methods.softmax import capped, masked_softmax


@evictors.register("expected")
@dataclass(frozen=True, kw_only=True)
class Expected(Evictor):
    """Keep the tokens that future queries will attend to, if they are distributed like the prompt's.

    Devoto et al. 2025, arXiv:2510.00636, as in kvpress. Queries are taken for Gaussian: their mean and covariance over
    the prompt, as they would be rotated on average over the next `future_tokens` positions, give each key's expected
    exponential, and a softmax over the keys its expected attention, which counts times the norm of its value. The
    queries and keys of the layer's sinks are left out. Nobody needs the queries before their rotation: from a rotated
    one it is a turn to any later position. A model without rotary positions has nothing to turn.

    The paper compresses once and lets the cache grow; here a new token takes the slot of the lowest score. In a chunk
    of a prompt, the queries are the chunk's own.

    Args:
        future_tokens: Positions after the prompt over which the rotation is averaged.
        covariance: Whether the spread of the queries counts, or their mean alone.
        value_norm: Whether the norm of a token's value counts.
        epsilon: Added to the expected attention, so that a large value counts for something by itself (kvpress: 0).

    Raises:
        MethodError: `future_tokens` is below 1, or `epsilon` below 0.
    """

    needs: ClassVar[Signal] = Signal.ALL_QUERIES | Signal.ROTATION
    future_tokens: int = tunable(512, IntRange(16, 2048, log=True))
    covariance: bool = tunable(True, Choice(True, False))
    value_norm: bool = tunable(True, Choice(True, False))
    epsilon: float = tunable(0.02, Choice(0.0, 0.02, 0.2))

    def __post_init__(self) -> None:
        if self.future_tokens < 1:
            raise MethodError(f"expected.future_tokens is {self.future_tokens}; it must be at least 1")
        if not 0 <= self.epsilon < torch.inf:
            raise MethodError(f"expected.epsilon is {self.epsilon}; it must be at least 0")

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: expected attention times the value's norm; sinks outrank every other token."""
        assert view.queries is not None
        Hkv, scaling = view.keys.shape[1], view.scaling
        keys, times = view.keys.float(), view.times  # [B, Hkv, T, D], [B, 1 or Hkv, T]
        W = view.queries.shape[2]
        # Positions in a chunk differ between heads only for the slots, not for the queries that come with it.
        asked = times[:, 0, -W:]
        counts = view.valid[:, -W:] & (asked >= view.sink_tokens)
        counts = torch.where(counts.any(-1, keepdim=True), counts, view.valid[:, -W:])  # [B, W]
        logits = []
        for queries in view.queries.unflatten(1, (Hkv, -1)).unbind(2):  # [B, Hkv, W, D]; one after the other: memory
            mean, spread = self._moments(view, queries.float(), asked, counts)
            logit = (keys @ mean[..., None])[..., 0] * scaling  # [B, Hkv, T]
            if self.covariance:
                logit = logit + ((keys @ spread) * keys).sum(-1) * (scaling**2 / 2)
            logits.append(logit)
        z = capped(torch.stack(logits, 2), view.softcap)[..., None, :]  # [B, Hkv, G, 1, T]
        sinks = times < view.sink_tokens
        seen = view.valid[:, None] & ~sinks
        score = masked_softmax(z, seen[:, :, None, None], view.sink_logits)[:, :, :, 0].mean(2) + self.epsilon
        if self.value_norm:
            score = score * view.values.float().norm(dim=-1)
        top = score.masked_fill(~seen, 0).amax(-1, keepdim=True) + 1
        return torch.where(sinks, top, score)

    def _moments(self, view: PromptView, queries: Tensor, asked: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, Hkv, D] and covariance [B, Hkv, D, D] of queries [B, Hkv, W, D] as they will be asked on average."""
        if view.rotation is not None:
            ahead = asked.amax(-1, keepdim=True) + 1 - asked
            queries = view.rotation.moved(queries, ahead, self.future_tokens)
        weight = counts[:, None, :, None].float()
        total = weight.sum(2).clamp_min(1)  # [B, 1, 1]
        mean = (queries * weight).sum(2) / total
        centred = (queries - mean[:, :, None]) * weight
        return mean, centred.mT @ centred / total[..., None]
