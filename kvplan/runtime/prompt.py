"""What evictors need of a prompt, and which of its tokens go into which slot."""

from __future__ import annotations

import torch
from torch import Tensor

from kvplan.methods.evictors import Evictor, PromptView, Signal
from kvplan.policy.schema import LayerPolicy
from kvplan.runtime.kernels import choose
from kvplan.runtime.kernels.dense import AttentionArgs


def prompt_view(
    evictor: Evictor, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs, sink_tokens: int
) -> PromptView:
    """The view with just the signals that the evictor needs."""
    wants_sums, wants_all = Signal.COLUMN_SUMS in evictor.needs, Signal.ALL_QUERIES in evictor.needs
    return PromptView(
        keys=keys,
        values=values,
        valid=valid,
        scaling=args.scaling,
        softcap=args.softcap,
        sink_logits=args.sink_logits,
        queries=q if wants_all else q[:, :, -max(evictor.window_tokens_needed, 1) :],
        column_sums=choose.column_sums(q, keys, valid, args) if wants_sums else None,
        sink_tokens=sink_tokens,
        rotation=args.rotation,
    )


def prompt_channels(policy: LayerPolicy, q: Tensor, keys: Tensor, valid: Tensor) -> Tensor | None:
    """The key channels that stay, [B, Hkv, C] int64; None: all."""
    if policy.channels is None:
        return None
    return policy.channels.select(q[:, :, -policy.channels.window_tokens_needed :], keys, valid)


def choose_slots(
    scores: Tensor | None, policy: LayerPolicy, capacity: int | None, num_tokens: int, device: torch.device
) -> Tensor:
    """Which tokens a row keeps, in slot order: [H, n] int64; by time alone without scores."""
    if scores is not None:
        return slot_order(scores, policy, capacity)
    kept = num_tokens if capacity is None else min(num_tokens, capacity)
    return torch.arange(num_tokens - kept, num_tokens, device=device)[None]


def slot_order(scores: Tensor, policy: LayerPolicy, capacity: int | None) -> Tensor:
    """Which prompt tokens a row keeps, in slot order.

    Sinks come first. A ring (evictors that keep no scores) is then filled from the lowest rank up, so that the slots
    to be overwritten first hold the tokens that matter least; recent tokens come last, in order of time. Score
    evictors keep the order of time. Ties go to the later token.

    Args:
        scores: [H, T_b] of one row, without padding.
        capacity: Slots of the row, or None for all.

    Returns:
        [H, n] int64 token indices, n = min(T_b, capacity).
    """
    H, T = scores.shape
    everything = torch.arange(T, device=scores.device).expand(H, T)
    if capacity is None:
        return everything
    keep = min(T, capacity)
    sinks = min(policy.protected_sinks, keep)
    ranked = scores.double().clone()
    recent = max(policy.recent_tokens, policy.stored_whole[1])
    ranked[:, T - min(recent, T) :] = torch.inf
    rest = ranked[:, sinks:].flip(-1)
    descending = T - 1 - rest.sort(dim=-1, descending=True, stable=True).indices[:, : keep - sinks]
    kept = torch.cat([everything[:, :sinks], descending.flip(-1)], -1)
    return kept.sort(dim=-1).values if policy.evictor.keeps_scores else kept


def row_lengths(valid: Tensor) -> list[int]:
    """Tokens per row of a left-padded batch."""
    return [int(n) for n in valid.sum(-1).tolist()]
