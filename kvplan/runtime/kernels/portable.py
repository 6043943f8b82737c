"""The kernels in plain torch, for any device and dtype: what runs where Triton does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvplan.methods.codecs.packing import working_dtype
from kvplan.methods.softmax import capped
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.encoded import Encoded
from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Probs, Sequences

QUERY_BLOCK = 128
COLUMN_BLOCK = 32  # on a CPU: what a block of logits takes must stay in its caches


def side_by_side(buffer: Tensor, seqs: Sequences) -> Tensor:
    """[N, longest, ...] of a flat [slots, ...] buffer: a view where the sequences are even, else a padded copy."""
    if seqs.even is not None:
        return buffer[: len(seqs) * seqs.even].unflatten(0, (len(seqs), seqs.even))[:, : seqs.longest]
    index = seqs.starts[:, None] + torch.arange(seqs.longest, device=buffer.device)
    return buffer[index.clamp(max=buffer.shape[0] - 1)]


def visible_slots(seqs: Sequences) -> Tensor:
    """[N, longest] bool, True on slots in use."""
    return torch.arange(seqs.longest, device=seqs.held.device) < seqs.held[:, None]


def decode(q: Tensor, keys: Tensor, values: Tensor, seqs: Sequences, args: DecodeArgs, need_lse: bool) -> Decoded:
    """As `reference.decode`; SDPA where only the output is wanted. Float64 stays float64.

    Args:
        q: [N, G, Dk]; keys: [slots, Dk]; values: [slots, Dv].
        need_lse: Whether to give `lse` even if that costs SDPA.
    """
    keys, values = side_by_side(keys, seqs), side_by_side(values, seqs)  # [N, longest, D]
    visible = visible_slots(seqs)
    plain = args.softcap is None and args.sink_logits is None and args.probs is Probs.NONE
    if plain and not need_lse and q.shape[-1] == keys.shape[-1]:
        mask = visible[:, None, None]
        if args.bias is not None:
            bias = side_by_side(args.bias, seqs)[:, None, None].to(q.dtype)
            mask = bias.masked_fill(~mask, -torch.inf)
        # One "head" of G queries per sequence; `nan_to_num` is for a sequence that holds nothing.
        out = F.scaled_dot_product_attention(
            q[:, None], keys[:, None], values[:, None], attn_mask=mask, scale=args.scaling
        )
        return Decoded(out[:, 0].nan_to_num(0.0))
    return attend_logits(q @ keys.mT, lambda p: p.to(values.dtype) @ values, seqs, args, q.dtype)


def quantized_decode(q: Tensor, keys: Encoded, values: Encoded, seqs: Sequences, args: DecodeArgs) -> Decoded:
    """The same over encoded slots, by the codecs' own `dot` and `mix`: nothing is decoded as a whole.

    Args:
        q: [N, G, Dk].
    """
    slots = seqs.longest
    products = keys.codec.dot(q, _units(keys, seqs))[..., :slots]

    def mix(probs: Tensor) -> Tensor:
        codes = _units(values, seqs)
        room = next(iter(codes.values())).shape[1] * values.unit_slots
        return values.codec.mix(F.pad(probs, (0, room - slots)), codes, values.dim)

    return attend_logits(products, mix, seqs, args, q.dtype)


def _units(encoded: Encoded, seqs: Sequences) -> dict[str, Tensor]:
    """The codes of each sequence: every field [N, units that hold the longest, width]."""
    size = encoded.unit_slots
    units = replace(
        seqs,
        starts=seqs.starts // size,
        longest=-(-seqs.longest // size),
        even=None if seqs.even is None else seqs.even // size,
    )
    return {name: side_by_side(field, units) for name, field in encoded.codes.items()}


def attend_logits(
    products: Tensor, mix: Callable[[Tensor], Tensor], seqs: Sequences, args: DecodeArgs, dtype: torch.dtype
) -> Decoded:
    """From query-key products [N, G, longest] to the whole answer; `mix` takes probabilities to weighted values."""
    logits = products if products.dtype == torch.float64 else products.float()
    logits = capped(logits * args.scaling, args.softcap)
    if args.bias is not None:
        logits = logits + side_by_side(args.bias, seqs)[:, None].to(logits.dtype)
    logits = logits.masked_fill(~visible_slots(seqs)[:, None], -torch.inf)
    lse = logits.logsumexp(-1)  # [N, G]
    if args.sink_logits is not None:
        lse = torch.logaddexp(lse, args.sink_logits.to(lse.dtype))
    probs = torch.exp(logits - lse[..., None]).nan_to_num(0.0)  # NaN where a sequence holds nothing
    out = mix(probs).to(dtype)
    wanted = {Probs.NONE: None, Probs.HEADS: probs, Probs.MEAN: probs.mean(1)}[args.probs]
    return Decoded(out, lse, wanted)


def attention_lse(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs) -> Tensor:
    """As `reference.attention_lse`, blocked over queries: [B, Hq, T] float32 (float64 for float64 keys)."""
    T, offset = q.shape[2], keys.shape[2] - q.shape[2]
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        logits, stop = _block_logits(q, keys, valid, start, args)
        lse = _with_sinks(logits.logsumexp(-1), args)  # [B, Hkv, G, t]
        parts.append(lse.masked_fill(~valid[:, None, None, offset + start : offset + stop], 0.0))
    return torch.cat(parts, -1).flatten(1, 2)


def column_sums(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs, lse: Tensor | None = None) -> Tensor:
    """As `reference.column_sums`, blocked over queries, so that memory is O(block x N).

    Args:
        lse: [B, Hq, T] as `attention_lse` gives it, or None to compute it on the way.
    """
    B, Hkv, N, _ = keys.shape
    T, G, dtype = q.shape[2], q.shape[1] // Hkv, working_dtype(keys.dtype)
    block = COLUMN_BLOCK if q.device.type == "cpu" else QUERY_BLOCK
    grouped = q.unflatten(1, (Hkv, G)).to(dtype) * args.scaling  # [B, Hkv, G, T, D]
    keys_t = keys.to(dtype).mT
    padded = not bool(valid.all())
    later = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
    sums = keys.new_zeros((B, Hkv, N), dtype=dtype)
    for start in range(0, T, block):
        size = min(block, T - start)
        first, end = N - T + start, N - T + start + size
        logits = grouped[:, :, :, start : start + size].flatten(2, 3) @ keys_t[..., :end]
        logits = capped(logits, args.softcap).unflatten(2, (G, size))  # [B, Hkv, G, t, end]
        logits[..., first:].masked_fill_(later[:size, :size], -torch.inf)
        if padded:
            logits.masked_fill_(~valid[:, None, None, None, :end], -torch.inf)
        if lse is not None:
            probs = logits.sub_(lse[..., start : start + size].unflatten(1, (Hkv, G))[..., None].to(dtype)).exp_()
        elif args.sink_logits is not None:
            probs = logits.sub_(_with_sinks(logits.logsumexp(-1), args)[..., None]).exp_()
        else:
            probs = logits.softmax(-1)
        if padded:
            probs.masked_fill_(~valid[:, None, None, first:end, None], 0.0)  # NaN so far
        sums[..., :end] += probs.flatten(2, 3).sum(2)
    return sums / G


def _with_sinks(lse: Tensor, args: AttentionArgs) -> Tensor:
    """[B, Hkv, G, t] with the sinks' mass."""
    if args.sink_logits is None:
        return lse
    return torch.logaddexp(lse, args.sink_logits.to(lse.dtype).view(-1, *lse.shape[1:3], 1))


def _block_logits(q: Tensor, keys: Tensor, valid: Tensor, start: int, args: AttentionArgs) -> tuple[Tensor, int]:
    """[B, Hkv, G, t, end] logits of the queries from `start` to the returned stop, -inf where not visible."""
    T, Hkv, offset = q.shape[2], keys.shape[1], keys.shape[2] - q.shape[2]
    stop = min(start + QUERY_BLOCK, T)
    end = offset + stop
    dtype = working_dtype(keys.dtype)
    block = q[:, :, start:stop].unflatten(1, (Hkv, -1)).to(dtype)  # [B, Hkv, G, t, D]
    products = block.flatten(2, 3) @ keys[:, :, :end].to(dtype).mT
    logits = capped(products.unflatten(2, block.shape[2:4]) * args.scaling, args.softcap)
    columns = torch.arange(end, device=keys.device)
    hidden = (columns > columns[offset + start :, None]) | ~valid[:, None, None, None, :end]
    return logits.masked_fill(hidden, -torch.inf), stop
