"""Where attention goes: statistics of sampled queries, and the attention that sdpa lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvplan.calibrate.statistics import MASS_LEVELS, NORM_LEVELS, PREFIX_LEVELS

LAST_ROWS = 32  # queries at the end of the prompt: they resemble the decode steps that a cache serves
SPREAD_ROWS = 16  # queries spread evenly over the rest
SORTED_STEP = 4  # effective tokens need a sort, so only every 4th of the last rows counts
QUERY_BLOCK = 128


def sampled_rows(num_tokens: int) -> list[int]:
    """Positions of the queries whose attention is measured: the last ones, latest first, and some of the rest."""
    rest = max(num_tokens - LAST_ROWS, 0)
    spread = min(SPREAD_ROWS, rest)
    return [*range(num_tokens - 1, rest - 1, -1), *(i * rest // spread for i in range(spread))]


def attention_shape(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    weights: Tensor,
    valid: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    sinks: int = 4,
    recent: int = 16,
) -> dict[str, Tensor]:
    """Statistics of the attention of sampled queries, in float32.

    Mass, entropy and effective tokens are those of a query group's mean attention: a KV head keeps one set of tokens.

    Args:
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D].
        mask: [B, 1, T, T] bool, or None for plain causal attention.
        rows: [B, R] columns of the sampled queries, the last query first.
        weights: [B, R].
        valid: [B, T] bool.
        sink_logits: [Hq] logits of a learned sink outside the cache, or None.

    Returns:
        sink_mass, recent_mass, entropy, head_agreement [B, Hkv], effective_tokens [B, Hkv, M], prefix_tokens [B, P] and
        norm_tokens [B, N].
    """
    B, Hkv, T, D = key.shape
    R, G = rows.shape[1], query.shape[1] // Hkv
    q = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, D)).float() * scaling  # [B, Hq, R, D]
    logits = (q.view(B, Hkv, G * R, D) @ key.float().mT).view(B, Hkv, G, R, T)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    columns = torch.arange(T, device=key.device)
    visible = (
        columns <= rows[:, :, None] if mask is None else mask[torch.arange(B, device=mask.device)[:, None], 0, rows]
    )
    logits.masked_fill_(~visible[:, None, None], torch.finfo(torch.float32).min)
    if sink_logits is not None:
        extra = sink_logits.float().view(1, Hkv, G, 1, 1).expand(B, -1, -1, R, 1)
        probs = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
        # What the learned sink takes is held by no token; the rest is a distribution over the tokens.
        probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-20)
    else:
        probs = logits.softmax(-1)  # [B, Hkv, G, R, T]
    mean = probs.mean(2) if G > 1 else probs[:, :, 0]  # [B, Hkv, R, T]
    first = valid.int().argmax(1)  # [B] column of the first token
    is_sink = (valid & (columns < first[:, None] + sinks)).float()
    near = rows[:, :, None] - torch.arange(recent, device=rows.device)  # [B, R, recent]
    near_mass = mean.gather(3, near.clamp_min(0)[:, None].expand(-1, Hkv, -1, -1))
    near_mass = near_mass * (near >= first[:, None, None])[:, None]
    ranked = mean[:, :, :LAST_ROWS:SORTED_STEP].sort(-1, descending=True).values  # [B, Hkv, R', T]
    last_weights = weights[:, :LAST_ROWS:SORTED_STEP]
    last_weights = last_weights / last_weights.sum(1, keepdim=True)
    counts = _tokens_for(ranked, MASS_LEVELS)  # [B, Hkv, R', M]
    norms = ranked.square().cumsum(-1).sqrt().mean(1)  # [B, R', T]: one number of tokens for all heads
    norm_counts = _tokens_reaching(norms, norms[..., -1:] * torch.tensor(NORM_LEVELS, device=key.device))
    # The first samples are the last queries themselves; each of the others stands for many.
    lengths, spread = valid.sum(1, keepdim=True), (weights[:, LAST_ROWS:] > 0).sum(1, keepdim=True)
    stands_for = (weights > 0).float()
    stands_for[:, LAST_ROWS:] *= (lengths - LAST_ROWS) / spread.clamp_min(1)
    received = (mean.mean(1) * stands_for[..., None]).sum(1)  # [B, T]
    received = (received / received.sum(-1, keepdim=True)).sort(-1, descending=True).values
    if G > 1:
        # |sum of unit vectors|^2 = G + sum over ordered pairs of their cosine
        unit_sum = (probs / probs.norm(dim=-1, keepdim=True).clamp_min(1e-20)).sum(2)
        agreement = (unit_sum.square().sum(-1) - G) / (G * (G - 1))
    else:
        agreement = torch.ones_like(mean[..., 0])

    def average(values: Tensor) -> Tensor:
        return (values * weights[:, None]).sum(-1)

    return {
        "sink_mass": average((mean @ is_sink[:, None, :, None])[..., 0]),
        "recent_mass": average(near_mass.sum(-1)),
        "entropy": average(torch.special.entr(mean).sum(-1)),
        "head_agreement": average(agreement),
        "effective_tokens": (counts * last_weights[:, None, :, None]).sum(2),
        "prefix_tokens": _tokens_for(received, PREFIX_LEVELS).float(),
        "norm_tokens": (norm_counts * last_weights[..., None]).sum(1),
    }


def _tokens_for(ranked: Tensor, levels: tuple[float, ...]) -> Tensor:
    """How many of the first entries of a descending distribution [..., T] hold each level: [..., M]."""
    wanted = torch.tensor(levels, device=ranked.device).expand(*ranked.shape[:-1], -1)
    return _tokens_reaching(ranked.cumsum(-1), wanted)


def _tokens_reaching(sums: Tensor, wanted: Tensor) -> Tensor:
    """How many tokens the ascending sums [..., T] need to reach what is wanted [..., M]: [..., M]."""
    # Searching for a level counts the tokens before it; one more reaches it.
    return torch.searchsorted(sums.contiguous(), wanted.contiguous()).clamp_max(sums.shape[-1] - 1) + 1


def head_cosine(value: Tensor, output: Tensor, counted: Tensor) -> Tensor:
    """Cosine between a token's value and what a head makes of it there: [B, Hkv], mean over group and tokens.

    Gulhan et al. 2025, BaKlaVa, arXiv:2502.13176.

    Args:
        value: [B, Hkv, T, Dv].
        output: [B, T, Hq, Dv].
        counted: [B, T] bool, the tokens that count.
    """
    made = output.transpose(1, 2).unflatten(1, (value.shape[1], -1)).float()  # [B, Hkv, G, T, Dv]
    cosine = F.cosine_similarity(made, value[:, :, None].float(), dim=-1).mean(2)  # [B, Hkv, T]
    counted = counted[:, None]
    return cosine.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).clamp_min(1)


def softcapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention with what sdpa lacks (Gemma 2's soft cap, gpt-oss' sinks), in blocks of queries: [B, T, Hq, D]."""
    Hkv, T = key.shape[1:3]
    grouped = query.unflatten(1, (Hkv, -1))  # [B, Hkv, G, T, D]
    columns = torch.arange(T, device=key.device)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        logits = (grouped[:, :, :, start:stop] @ key[:, :, None].mT).float() * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        visible = columns <= columns[start:stop, None] if mask is None else mask[:, :, None, start:stop]
        logits = logits.masked_fill(~visible, torch.finfo(torch.float32).min)
        if sink_logits is not None:
            extra = sink_logits.float().view(1, Hkv, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, extra], -1)
        probs = logits.softmax(-1)[..., :T].to(value.dtype)
        blocks.append(probs @ value[:, :, None])
    return torch.cat(blocks, 3).flatten(1, 2).transpose(1, 2).contiguous()
