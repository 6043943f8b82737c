"""LagKV: tokens that stand out against the chunk that follows theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.evictors.base import Evictor, PromptView, evictors
from kvplan.methods.params import IntRange, tunable


@evictors.register("lagkv")
@dataclass(frozen=True, kw_only=True)
class LagKV(Evictor):
    """Keep, of each chunk of the prompt, the tokens whose keys and values spread most on the scale of the next chunk.

    Liang et al. 2025, arXiv:2504.04704. Behind the layer's sinks come chunks of `lag_tokens`; the last whole one and
    the rest after it have no chunk to be compared with and stay longest. Chunks share the slots evenly: a token counts
    by its rank in its chunk, as in kvpress, and of equal ranks the later one stays. The authors also compress each
    chunk of generated tokens; here a new token takes the slot of the lowest rank. In a prompt that comes in chunks, the
    slots and the new piece are divided anew.

    Args:
        lag_tokens: Tokens of a chunk.

    Raises:
        MethodError: `lag_tokens` is below 1.
    """

    lag_tokens: int = tunable(64, IntRange(16, 512, log=True))

    def __post_init__(self) -> None:
        if self.lag_tokens < 1:
            raise MethodError(f"lagkv.lag_tokens is {self.lag_tokens}; it must be at least 1")

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: the rank in the token's chunk, from 0 to below 1; 1 for what has none."""
        B, Hkv, T, _ = view.keys.shape
        scores = torch.ones(B, Hkv, T, device=view.keys.device)
        for b, valid in enumerate(view.valid):
            columns = valid.nonzero()[:, 0].expand(Hkv, -1)  # [Hkv, n]
            if view.positions is not None:
                times = view.positions[b].expand(Hkv, -1).gather(-1, columns)
                columns = columns.gather(-1, times.argsort(-1))
            ranks = self._ranks([_rows(x[b], columns) for x in (view.keys, view.values)], view.sink_tokens)
            scores[b].scatter_(-1, columns[:, view.sink_tokens :][:, : ranks.shape[-1]], ranks)
        return scores

    def _ranks(self, states: list[Tensor], sinks: int) -> Tensor:
        """Of keys and values [Hkv, n, D] of one row, in order of time: [Hkv, m] for the m tokens after the sinks."""
        heads, n, _ = states[0].shape
        L = self.lag_tokens
        chunks = max((n - sinks) // L - 1, 0)
        if chunks == 0:
            return states[0].new_zeros(heads, 0, dtype=torch.float32)
        spread = torch.zeros(heads, chunks, L, device=states[0].device)
        for x in states:
            x = x[:, sinks : sinks + (chunks + 1) * L].float().unflatten(1, (chunks + 1, L))
            low, high = x[:, 1:].amin(2, keepdim=True), x[:, 1:].amax(2, keepdim=True)
            # A channel that does not change in the next chunk gives no scale; it is left out.
            scaled = torch.where(high > low, (x[:, :-1] - low) / (high - low), 0.0)
            spread += scaled.std(-1).softmax(-1)
        ranks = spread.argsort(dim=-1, stable=True).argsort(-1)
        return ranks.flatten(1) / L


def _rows(x: Tensor, columns: Tensor) -> Tensor:
    """[Hkv, T, D] at [Hkv, n] -> [Hkv, n, D]."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
