"""Scissorhands: tokens that were important stay important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.evictors.base import Evictor, PromptView, Signal, Step, evictors
from kvplan.methods.evictors.window import attention_blocks
from kvplan.methods.params import IntRange, tunable


@evictors.register("scissorhands")
@dataclass(frozen=True, kw_only=True)
class Scissorhands(Evictor):
    """Drop the tokens that most of the recent queries found unimportant.

    Liu et al. 2023, arXiv:2305.17118. A token is unimportant to a query that gives it no more than the mean weight, one
    part in the tokens that the query sees, and is marked for it; the query heads of a group mark in equal parts. A
    prompt is marked by its last `history_tokens` queries, each looking at the whole prompt before it.

    The paper drops many tokens at a time and counts its last queries anew each time; here one token goes per step, and
    instead of bits for every query a slot keeps one number, which forgets one part in `history_tokens` per step and
    adds the step's mark: in the long run the same count. Their public code (masks on the prompt of OPT) judges by
    quantiles and is not followed. In a chunk of a prompt the chunk's own queries mark.

    Args:
        history_tokens: Queries whose marks count.

    Raises:
        MethodError: `history_tokens` is below 1.
    """

    needs: ClassVar[Signal] = Signal.QUERIES
    keeps_scores: ClassVar[bool] = True
    history_tokens: int = tunable(400, IntRange(16, 1024, log=True))

    def __post_init__(self) -> None:
        if self.history_tokens < 1:
            raise MethodError(f"scissorhands.history_tokens is {self.history_tokens}; it must be at least 1")

    @property
    def window_tokens_needed(self) -> int:
        return self.history_tokens

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: minus the marks."""
        B, Hkv, T, _ = view.keys.shape
        seen = view.valid.cumsum(-1).clamp_min(1)  # [B, T] tokens that each column's query sees
        columns = torch.arange(T, device=view.keys.device)
        marks = torch.zeros(B, Hkv, T, device=view.keys.device)
        for start, stop, probs in attention_blocks(view, self.history_tokens):
            visible = (columns[:stop] <= columns[start:stop, None]) & view.valid[:, start:stop, None]  # [B, W, stop]
            mean = 1 / seen[:, None, None, start:stop, None].float()
            unimportant = (probs <= mean) & visible[:, None, None]
            marks[..., :stop] += unimportant.float().mean(2).sum(2)
        return -marks

    def observe(self, scores: Tensor, probs: Tensor, step: Step) -> Tensor:
        unimportant = (probs <= 1 / step.held[..., None].float()).float().mean(2)  # [B, Hkv, S]
        return scores - scores / self.history_tokens - unimportant
