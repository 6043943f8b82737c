"""Attention of the prompt's last queries over the whole prompt, recomputed beside any attention kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from kvplan.methods.evictors.base import PromptView
from kvplan.methods.softmax import capped, masked_softmax

QUERY_BLOCK = 128


def window_attention(view: PromptView, num_queries: int) -> tuple[Tensor, Tensor]:
    """Softmax attention of the last queries, in float32.

    Returns:
        probs [B, Hkv, G, W, T], zero on padding, and query_valid [B, W] bool; W = min(num_queries, T).
    """
    assert view.queries is not None
    B, Hkv, T, _ = view.keys.shape
    W = min(num_queries, T, view.queries.shape[2])
    q = view.queries[:, :, -W:].unflatten(1, (Hkv, -1))  # [B, Hkv, G, W, D]
    logits = (q.flatten(2, 3).float() @ view.keys.float().mT).unflatten(2, q.shape[2:4]) * view.scaling
    logits = capped(logits, view.softcap)
    positions = torch.arange(T, device=logits.device)
    visible = positions <= positions[-W:, None]  # [W, T]
    mask = visible & view.valid[:, None, None, None]  # [B, 1, 1, W, T]
    query_valid = view.valid[:, -W:]
    probs = masked_softmax(logits, mask, view.sink_logits)
    return probs * query_valid[:, None, None, :, None], query_valid


def attention_blocks(view: PromptView, num_queries: int) -> Iterator[tuple[int, int, Tensor]]:
    """`window_attention` of the last queries, some at a time, so that the memory stays small.

    Yields:
        start, stop: Columns of the queries.
        probs: [B, Hkv, G, stop - start, stop].
    """
    assert view.queries is not None
    T = view.keys.shape[2]
    for start in range(T - min(num_queries, T, view.queries.shape[2]), T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        block = dataclasses.replace(
            view,
            queries=view.queries[:, :, start - T : stop - T or None],
            keys=view.keys[:, :, :stop],
            valid=view.valid[:, :stop],
        )
        yield start, stop, window_attention(block, stop - start)[0]
