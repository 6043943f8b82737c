"""Attention of new queries over slots, query groups folded so that no key is ever repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvplan.methods.rotation import Rotation
from kvplan.methods.softmax import capped, masked_softmax


@dataclass(frozen=True)
class AttentionArgs:
    """What a model asks of its attention: scale, logit soft cap and learned sink logits [Hq] or [B, Hq] (or None).

    `rotation` is how it had rotated queries and keys: no kernel's business, but an evictor's.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sink_logits is None

    def by_head(self, rows: int, kv_heads: int) -> AttentionArgs:
        """The same for a batch in which every KV head is a row of its own."""
        if self.sink_logits is None:
            return self
        return replace(self, sink_logits=self.sink_logits.view(1, kv_heads, -1).expand(rows, -1, -1).flatten(0, 1))

    def of_rows(self, start: int, stop: int) -> AttentionArgs:
        """The same for some of the rows."""
        if self.sink_logits is None or self.sink_logits.ndim == 1:
            return self
        return replace(self, sink_logits=self.sink_logits[start:stop])


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, args: AttentionArgs) -> Tensor:
    """Masked attention.

    Args:
        q: [B, Hq, T, D].
        keys, values: [B, Hkv, S, D].
        mask: [B or 1, Hkv or 1, T, S] bool, True is visible; None makes all visible.

    Returns:
        [B, T, Hq, Dv].
    """
    B, Hq, T, _ = q.shape
    Hkv = keys.shape[1]
    if not args.plain:
        probs = attention_probs(q, keys, mask, args)
        out = (probs.to(values.dtype).flatten(2, 3) @ values).unflatten(2, (Hq // Hkv, T))
    else:
        grouped = q.reshape(B, Hkv, -1, q.shape[-1])  # [B, Hkv, G * T, D]
        if mask is not None and T > 1:
            mask = mask[:, :, None].expand(-1, -1, Hq // Hkv, -1, -1).flatten(2, 3)  # [B, ., G * T, S]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=args.scaling)
        if T == 1:
            return out.reshape(B, 1, Hq, -1)
        out = out.unflatten(2, (Hq // Hkv, T))  # [B, Hkv, G, T, Dv]
    return out.flatten(1, 2).transpose(1, 2)


def attention_logits(q: Tensor, keys: Tensor, args: AttentionArgs) -> Tensor:
    """Query-key products, scaled and soft-capped: [B, Hkv, G, T, S] float32 (float64 for float64 keys)."""
    B, Hkv = q.shape[0], keys.shape[1]
    T = q.shape[2]
    grouped = q.reshape(B, Hkv, -1, q.shape[-1])
    logits = (grouped @ keys.mT).unflatten(2, (-1, T)) * args.scaling
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return capped(logits, args.softcap)


def attention_probs(q: Tensor, keys: Tensor, mask: Tensor | None, args: AttentionArgs) -> Tensor:
    """[B, Hkv, G, T, S] probabilities; `mask` as in `attend`."""
    visible = None if mask is None else mask[:, :, None]
    return masked_softmax(attention_logits(q, keys, args), visible, args.sink_logits)
