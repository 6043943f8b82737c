"""The softmax of a model's attention: logits soft-capped, learned sinks taking their mass."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped logits (Gemma 2): softcap * tanh(logits / softcap)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def masked_softmax(logits: Tensor, mask: Tensor | None, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last axis; zero where masked.

    Args:
        logits: [B, Hkv, G, T, S].
        mask: Broadcastable to `logits`, True is visible; None makes all visible.
        sink_logits: [Hkv * G] learned logits that take mass but are not returned (gpt-oss), [B, Hkv * G] where they
            differ between rows, or None.
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sink_logits is None:
        probs = logits.softmax(-1)
    else:
        B, Hkv, G, T, _ = logits.shape
        sinks = sink_logits.to(logits.dtype).view(-1, Hkv, G, 1, 1).expand(B, -1, -1, T, -1)
        probs = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return probs if mask is None else probs * mask
