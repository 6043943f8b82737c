# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles the kernels' source; annotations there mean something else to it.
"""Column sums of a prompt's attention in Triton: what each key receives from all queries, for H2O.

The attention matrix is not stored, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135): with every query's
log-sum-exp known, a key's column can be summed alone. One program owns a block of keys and walks the queries that see
it, so nothing is added by two programs and the result does not depend on their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.triton_decode import padded


@triton.jit
def _cap(x, scaling, softcap, CAP: tl.constexpr):
    x = x * scaling
    if CAP:
        e = tl.exp(-tl.abs(x) * (2.0 / softcap))
        tanh = (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0, -tanh, tanh) * softcap
    return x


@triton.jit
def _block(x, head, first, d, tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens `first` to `first + BLOCK` of one head: [BLOCK, PADDED], 0 beyond."""
    t = first + tl.arange(0, BLOCK)
    at = x + (head.to(tl.int64) * tokens + t[:, None]) * D + d[None, :]
    return tl.load(at, mask=(t < tokens)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _lse_kernel(
    q, keys, valid, sinks, lse, scaling, softcap, num_queries, num_keys,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of queries of one query head. HEADS: KV heads."""
    # The last blocks see the most keys: they go first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK
    head, row = tl.program_id(1), tl.program_id(2)
    d, i = tl.arange(0, PAD), first + tl.arange(0, BLOCK)
    column = i + (num_keys - num_queries)
    queries = _block(q, row * HEADS * G + head, first, d, num_queries, D, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if SINKS:
        highest = tl.zeros([BLOCK], tl.float32) + tl.load(sinks + row * HEADS * G + head).to(tl.float32)
        total += 1.0
    for at in range(0, tl.minimum(first + BLOCK, num_queries) + (num_keys - num_queries), BLOCK):
        k = _block(keys, row * HEADS + head // G, at, d, num_keys, D, BLOCK)
        s = at + tl.arange(0, BLOCK)
        here = tl.load(valid + row.to(tl.int64) * num_keys + s, mask=s < num_keys, other=0) != 0
        x = _cap(tl.dot(queries, tl.trans(k), input_precision="ieee"), scaling, softcap, CAP)
        x = tl.where((s[None, :] <= column[:, None]) & here[None, :], x, float("-inf"))
        new = tl.maximum(highest, tl.max(x, 1))
        finite = tl.where(new > float("-inf"), new, 0.0)  # padding sees nothing
        total = total * tl.exp(highest - finite) + tl.sum(tl.exp(x - finite[:, None]), 1)
        highest = new
    real = tl.load(valid + row.to(tl.int64) * num_keys + column, mask=i < num_queries, other=0) != 0
    result = tl.where(real, highest + tl.log(tl.where(real, total, 1.0)), 0.0)
    tl.store(lse + (row * HEADS * G + head).to(tl.int64) * num_queries + i, result, mask=i < num_queries)


@triton.jit
def _sums_kernel(
    q, keys, valid, lse, sums, scaling, softcap, num_queries, num_keys,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Column sums of a block of keys of one KV head."""
    first = tl.program_id(0) * BLOCK  # the first blocks are seen by the most queries, and go first
    head, row = tl.program_id(1), tl.program_id(2)
    d, s = tl.arange(0, PAD), first + tl.arange(0, BLOCK)
    offset = num_keys - num_queries
    mask = valid + row.to(tl.int64) * num_keys
    k = _block(keys, row * HEADS + head, first, d, num_keys, D, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for g in range(G):
        query_head = (row * HEADS + head) * G + g
        for at in range((tl.maximum(first - offset, 0) // BLOCK) * BLOCK, num_queries, BLOCK):
            queries = _block(q, query_head, at, d, num_queries, D, BLOCK)
            i = at + tl.arange(0, BLOCK)
            there = tl.load(mask + offset + i, mask=i < num_queries, other=0) != 0
            x = _cap(tl.dot(k, tl.trans(queries), input_precision="ieee"), scaling, softcap, CAP)  # [keys, queries]
            whole = tl.load(lse + query_head.to(tl.int64) * num_queries + i, mask=i < num_queries, other=0.0)
            visible = (s[:, None] <= (i + offset)[None, :]) & there[None, :]
            acc += tl.sum(tl.where(visible, tl.exp(x - whole[None, :]), 0.0), 1)
    here = tl.load(mask + s, mask=s < num_keys, other=0) != 0
    tl.store(sums + (row * HEADS + head).to(tl.int64) * num_keys + s, tl.where(here, acc / G, 0.0), mask=s < num_keys)


def _tile_of(keys: Tensor) -> dict[str, int]:
    """Square blocks as large as registers and shared memory allow; a guess to be tuned on hardware."""
    if keys.element_size() == 4:
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 2}
    if padded(keys.shape[-1]) <= 128:
        return {"BLOCK": 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK": 64, "num_warps": 4, "num_stages": 2}


def _shape(q: Tensor, keys: Tensor, args: AttentionArgs) -> dict[str, Any]:
    """What both kernels are compiled for."""
    Hkv, D = keys.shape[1], keys.shape[3]
    cap = args.softcap is not None
    return {"HEADS": Hkv, "G": q.shape[1] // Hkv, "D": D, "PAD": padded(D), "CAP": cap, **_tile_of(keys)}


def attention_lse(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs) -> Tensor:
    """As `reference.attention_lse`: [B, Hq, T] float32. For callers whose attention did not return it.

    Args:
        q: [B, Hq, T, D]; keys: [B, Hkv, N, D], both of one dtype: float16, bfloat16 or float32. valid: [B, N] bool.
    """
    B, Hq, T, _ = q.shape
    lse = q.new_empty(B, Hq, T, dtype=torch.float32)
    shape = _shape(q, keys, args)
    _lse_kernel[(triton.cdiv(T, shape["BLOCK"]), Hq, B)](
        q.contiguous(),
        keys.contiguous(),
        valid.to(torch.uint8),
        lse if args.sink_logits is None else args.sink_logits.expand(B, Hq).contiguous(),
        lse,
        args.scaling,
        args.softcap or 0.0,
        T,
        keys.shape[2],
        SINKS=args.sink_logits is not None,
        **shape,
    )
    return lse


def column_sums(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs, lse: Tensor | None = None) -> Tensor:
    """As `reference.column_sums`: [B, Hkv, N] float32.

    Args:
        lse: [B, Hq, T] float32 natural log, as FlashAttention returns it (sinks included), or None to compute it first,
            which doubles the work.
        Others as in `attention_lse`.
    """
    B, Hkv, N, _ = keys.shape
    if lse is None:
        lse = attention_lse(q, keys, valid, args)
    sums = q.new_empty(B, Hkv, N, dtype=torch.float32)
    shape = _shape(q, keys, args)
    _sums_kernel[(triton.cdiv(N, shape["BLOCK"]), Hkv, B)](
        q.contiguous(),
        keys.contiguous(),
        valid.to(torch.uint8),
        lse.contiguous(),
        sums,
        args.scaling,
        args.softcap or 0.0,
        q.shape[2],
        N,
        **shape,
    )
    return sums
