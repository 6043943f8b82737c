"""CaM: an evicted value lives on in the values after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.mergers.base import Merger, mergers
from kvplan.methods.params import Choice, tunable


@mergers.register("cam")
@dataclass(frozen=True, kw_only=True)
class CaM(Merger):
    """Spread the value that is about to be overwritten over the tokens after it, as far as attention still wants it.

    Zhang et al. 2024 (ICML, PMLR 235), as in the Llama path of the authors' code: with a probability of the token's
    attention over the mean attention of its followers (at most 1), `value / span` is added to each of the next `span`
    values; keys stay as they are. They draw that event; we add its expectation, so that a run repeats. They mask; here
    the slot is overwritten. Attention is averaged over the query group, so each KV head has one value to hand over.

    Fewer than `span` followers share the value in equal parts: at probability 1 exactly what leaves with the token has
    been handed over.

    Args:
        span: Followers that receive a part, the oldest first.

    Raises:
        MethodError: `span` is below 1.
    """

    merges_steps: ClassVar[bool] = True
    span: int = tunable(32, Choice(8, 16, 32, 64))

    def __post_init__(self) -> None:
        if self.span < 1:
            raise MethodError(f"cam.span is {self.span}; it must be at least 1")

    def parts(self, probs: Tensor, victim: Tensor, followers: Tensor) -> Tensor:
        b, Hkv, _ = probs.shape
        F = followers.shape[1]
        if F == 0:
            return probs.new_zeros(b, Hkv, 0)
        own = probs.gather(2, victim[:, None, None].expand(b, Hkv, 1))  # [b, Hkv, 1]
        mean = probs.gather(2, followers[:, None].expand(b, Hkv, F)).mean(2, keepdim=True)
        # At least the mean is certain, and nothing among nothing (0 / 0) is worth nothing.
        chance = torch.where((own >= mean) & (own > 0), 1.0, own / mean.clamp(min=torch.finfo(mean.dtype).tiny))
        receivers = min(F, self.span)
        return (chance / receivers).expand(b, Hkv, receivers)
