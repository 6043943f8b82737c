"""What every kernel must compute, written to be read: loops over sequences, queries and heads. Tests only."""

from __future__ import annotations

import torch
from torch import Tensor

from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.encoded import Encoded
from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Probs, Sequences


def decode(q: Tensor, keys: Tensor, values: Tensor, seqs: Sequences, args: DecodeArgs) -> Decoded:
    """Attention of one query token over the slots of its sequence, in float64.

    Args:
        q: [N, G, Dk]; keys: [slots, Dk]; values: [slots, Dv].
    """
    N, G, _ = q.shape
    q, keys, values = q.double(), keys.double(), values.double()
    out = torch.zeros(N, G, values.shape[-1], dtype=torch.float64)
    lse = torch.full((N, G), -torch.inf, dtype=torch.float64)
    probs = torch.zeros(N, G, seqs.longest, dtype=torch.float64)
    for n in range(N):
        slots, held = _span(seqs, n), int(seqs.held[n])
        for g in range(G):
            logits = keys[slots] @ q[n, g] * args.scaling  # [held]
            if args.softcap is not None:
                logits = args.softcap * torch.tanh(logits / args.softcap)
            if args.bias is not None:
                logits = logits + args.bias[slots].double()
            sink = torch.empty(0) if args.sink_logits is None else args.sink_logits[n, g, None]
            everything = torch.cat([logits, sink.double()])
            if len(everything) == 0:
                continue
            lse[n, g] = everything.logsumexp(0)
            probs[n, g, :held] = torch.exp(logits - lse[n, g])
            out[n, g] = probs[n, g, :held] @ values[slots]
    wanted = {Probs.NONE: None, Probs.HEADS: probs, Probs.MEAN: probs.mean(1)}[args.probs]
    return Decoded(out, lse, wanted)


def quantized_decode(q: Tensor, keys: Encoded, values: Encoded, seqs: Sequences, args: DecodeArgs) -> Decoded:
    """The same over encoded slots: decode them all, then attend."""
    dense_keys, dense_values = (e.codec.decode(e.codes, e.dim, torch.float64) for e in (keys, values))
    return decode(q, dense_keys, dense_values, seqs, args)


def _span(seqs: Sequences, n: int) -> slice:
    start = int(seqs.starts[n])
    return slice(start, start + int(seqs.held[n]))


def attention_lse(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs) -> Tensor:
    """Log of the sum of exponentiated causal logits, per query: [B, Hq, T] float64; 0 for queries that are padding.

    Args:
        q: [B, Hq, T, D], the queries of the last T columns; keys: [B, Hkv, N, D]; valid: [B, N] bool, False on padding.
        args: Its sink logits are [Hq] or [B, Hq].
    """
    B, Hq, T, _ = q.shape
    lse = torch.zeros(B, Hq, T, dtype=torch.float64)
    for b in range(B):
        for h in range(Hq):
            for t in range(T):
                if valid[b, keys.shape[2] - T + t]:
                    logits = _prompt_logits(q, keys, valid, args, b, h, t)
                    if args.sink_logits is not None:
                        logits = torch.cat([logits, args.sink_logits.expand(B, Hq)[b, h].double()[None]])
                    lse[b, h, t] = logits.logsumexp(0)
    return lse


def column_sums(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs) -> Tensor:
    """Attention mass that each key receives from all queries, mean over the query group.

    Args:
        As in `attention_lse`.

    Returns:
        [B, Hkv, N] float64; 0 on padding.
    """
    B, Hq, T, _ = q.shape
    Hkv, N = keys.shape[1], keys.shape[2]
    lse = attention_lse(q, keys, valid, args)
    sums = torch.zeros(B, Hkv, N, dtype=torch.float64)
    for b in range(B):
        for h in range(Hq):
            for t in range(T):
                end = N - T + t + 1
                if valid[b, end - 1]:
                    probs = torch.exp(_prompt_logits(q, keys, valid, args, b, h, t) - lse[b, h, t])
                    sums[b, h * Hkv // Hq, :end] += probs * Hkv / Hq
    return sums


def _prompt_logits(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs, b: int, h: int, t: int) -> Tensor:
    """Float64 logits of query `t` of head `h` over the keys up to its own; -inf on padding."""
    end = keys.shape[2] - q.shape[2] + t + 1
    logits = keys[b, h * keys.shape[1] // q.shape[1], :end].double() @ q[b, h, t].double() * args.scaling
    if args.softcap is not None:
        logits = args.softcap * torch.tanh(logits / args.softcap)
    return logits.masked_fill(~valid[b, :end], -torch.inf)
