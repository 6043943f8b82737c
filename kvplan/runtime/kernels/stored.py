"""Attention over stored slots, encoded or not, in one or several parts with one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvplan.methods.softmax import capped, masked_softmax
from kvplan.runtime.kernels import choose
from kvplan.runtime.kernels.dense import AttentionArgs, attend
from kvplan.runtime.kernels.fused import attend_fused
from kvplan.runtime.kernels.parts import Part


def attend_parts(
    q: Tensor, parts: Sequence[Part], args: AttentionArgs, want_probs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of new queries over slots.

    Args:
        q: [b, Hq, T, D].
        parts: What is visible; one softmax runs over all of them.
        want_probs: Whether the probabilities are needed.

    Returns:
        [b, T, Hq, Dv], and [b, Hkv, G, T, sum of S] probabilities in float32 or float64 (None unless wanted).
    """
    fused = attend_fused(q, parts, args, want_probs)
    if fused is not None:
        return fused
    if len(parts) == 1 and parts[0].plain and args.plain and not want_probs:
        part = parts[0]
        assert part.keys.dense is not None and part.values.dense is not None
        return attend(q, part.keys.dense, part.values.dense, part.mask, args), None
    return _attend_any(q, parts, args)


def attend_runs(
    q: Tensor, runs: Sequence[tuple[int, int, Part]], args: AttentionArgs, want_probs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token per row, where runs of rows hold different numbers of slots.

    Args:
        q: [B, Hq, 1, D].
        runs: First row, last row + 1 and what they see; together the whole batch.

    Returns:
        [B, 1, Hq, Dv], and [B, Hkv, G, 1, S of the longest] probabilities, 0 where a row has no slot (None unless
        wanted).
    """
    if len(runs) == 1:
        return attend_parts(q, (runs[0][2],), args, want_probs)
    if not choose.available(q):
        if want_probs:
            return _attend_padded(q, runs, args)
        # In fewer bits the logits would be rounded before the softmax.
        exact = q.dtype in (torch.float32, torch.float64)
        if exact and args.plain and all(part.bare for _, _, part in runs):
            return _attend_bare(q, runs, args), None
    found = [attend_parts(q[a:b], (part,), args.of_rows(a, b), want_probs) for a, b, part in runs]
    out = torch.cat([out for out, _ in found])
    if not want_probs:
        return out, None
    longest = max(part.slots for _, _, part in runs)
    return out, torch.cat([F.pad(p, (0, longest - p.shape[-1])) for _, p in found if p is not None])


def _attend_bare(q: Tensor, runs: Sequence[tuple[int, int, Part]], args: AttentionArgs) -> Tensor:
    """Run by run, with as little as can be around each of the many small calls."""
    found = []
    for own, (_, _, part) in zip(_by_run(q, runs), runs, strict=True):
        keys, values = part.by_head
        found.append((torch.bmm(own, keys).mul_(args.scaling)).softmax(-1).bmm(values))
    return torch.cat(found).view(q.shape[0], 1, q.shape[1], -1)


def _by_run(q: Tensor, runs: Sequence[tuple[int, int, Part]]) -> tuple[Tensor, ...]:
    """Each run's rows [b * Hkv, G, D] of queries [B, Hq, 1, D]."""
    heads = _heads(runs[0][2])
    return q.reshape(q.shape[0] * heads, -1, q.shape[-1]).split([(stop - start) * heads for start, stop, _ in runs])


def _attend_padded(q: Tensor, runs: Sequence[tuple[int, int, Part]], args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """One softmax over all rows, products row by row."""
    B, Hq = q.shape[:2]
    heads, longest = _heads(runs[0][2]), max(part.slots for _, _, part in runs)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = torch.full((B, heads, Hq // heads, longest), torch.finfo(dtype).min, dtype=dtype, device=q.device)
    bare = args.softcap is None and all(part.bare for _, _, part in runs)
    for own, (start, stop, part) in zip(_by_run(q, runs), runs, strict=True):
        room = logits[start:stop, ..., : part.slots]
        if bare:
            room.copy_(torch.bmm(own, part.by_head[0]).view(room.shape))
            continue
        found = _logits(own.unflatten(0, (-1, heads)), part, args, 1)
        if part.mask is not None:
            found = found.masked_fill(~part.mask[:, :, None], torch.finfo(dtype).min)
        room.copy_(found[..., 0, :])
    if bare:
        logits.mul_(args.scaling)
    probs = masked_softmax(logits[..., None, :], None, args.sink_logits)
    weights = probs.to(q.dtype)[..., 0, :]
    shares = [(weights[start:stop, ..., : part.slots], part) for start, stop, part in runs]
    mixed = [w.flatten(0, 1).bmm(part.by_head[1]) if bare else _mix(w, part).flatten(0, 1) for w, part in shares]
    return torch.cat(mixed).view(B, 1, Hq, -1), probs


def _heads(part: Part) -> int:
    return next(iter(part.keys.codes.values())).shape[1]


def _mix(weights: Tensor, part: Part) -> Tensor:
    dense = part.values.dense
    return part.values.codec.mix(weights, part.values.codes, part.values.dim) if dense is None else weights @ dense


def _attend_any(q: Tensor, parts: Sequence[Part], args: AttentionArgs) -> tuple[Tensor, Tensor]:
    T = q.shape[2]
    grouped = q.unflatten(1, (_heads(parts[0]), -1)).flatten(2, 3)  # [b, Hkv, G * T, D]
    found = [_logits(grouped, part, args, T) for part in parts]
    logits = found[0] if len(found) == 1 else torch.cat(found, -1)  # [b, Hkv, G, T, S]
    probs = masked_softmax(logits, _mask(parts, T), args.sink_logits)
    weights = probs.to(q.dtype).flatten(2, 3)
    out, start = None, 0
    for part in parts:
        share = _mix(weights[..., start : start + part.slots], part)
        out, start = share if out is None else out + share, start + part.slots
    assert out is not None
    return out.unflatten(2, (-1, T)).flatten(1, 2).transpose(1, 2), probs


def _logits(grouped: Tensor, part: Part, args: AttentionArgs, T: int) -> Tensor:
    """[b, Hkv, G, T, S], scaled, soft-capped and biased."""
    if part.channels is not None:
        index = part.channels[:, :, None].expand(-1, -1, grouped.shape[2], -1)
        grouped = grouped.gather(-1, index)
    dense = part.keys.dense
    products = grouped @ dense.mT if dense is not None else part.keys.codec.dot(grouped, part.keys.codes)
    products = products if products.dtype == torch.float64 else products.float()
    logits = capped(products[..., : part.slots].mul_(args.scaling), args.softcap)  # the products are ours alone
    if part.bias is not None:
        logits = logits + part.bias[:, :, None]
    return logits.unflatten(2, (-1, T))


def _mask(parts: Sequence[Part], T: int) -> Tensor | None:
    """[b, H or 1, 1, T or 1, sum of S] bool, or None when all is visible."""
    if all(part.mask is None for part in parts):
        return None
    if len(parts) == 1:
        assert parts[0].mask is not None
        return parts[0].mask[:, :, None]
    given = [part.mask for part in parts if part.mask is not None]
    shape = [max(mask.shape[axis] for mask in given) for axis in range(3)]
    masks = []
    for part in parts:
        mask = part.mask if part.mask is not None else given[0].new_ones(1, 1, 1, part.slots)
        masks.append(mask.expand(*shape, part.slots))
    return torch.cat(masks, -1)[:, :, None]
