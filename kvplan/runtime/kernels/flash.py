"""Decode attention by the flash-attn package, where it is installed. Never run by the tests: it needs a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Probs, Sequences


@cache
def _package() -> Any:
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


def fits(q: Tensor, keys: Tensor, values: Tensor, seqs: Sequences, args: DecodeArgs, need_lse: bool) -> bool:
    """Whether flash-attn can do it: even sequences, 16-bit numbers, neither sinks nor bias, only the output wanted."""
    plain = args.sink_logits is None and args.bias is None and args.probs is Probs.NONE and not need_lse
    shapes = seqs.even is not None and q.shape[-1] == values.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    number = keys.dtype in (torch.float16, torch.bfloat16)
    return plain and shapes and number and keys.is_cuda and _package() is not None


def decode(q: Tensor, keys: Tensor, values: Tensor, seqs: Sequences, args: DecodeArgs) -> Decoded:
    """As `reference.decode`. A sequence is a batch row with one KV head: the group's queries are its query heads."""
    assert seqs.even is not None
    shape = (len(seqs), seqs.even, 1, -1)
    out = _package().flash_attn_with_kvcache(
        q[:, None],  # [N, 1, G, D]
        keys[: len(seqs) * seqs.even].view(shape),
        values[: len(seqs) * seqs.even].view(shape),
        cache_seqlens=seqs.held,
        softmax_scale=args.scaling,
        softcap=args.softcap or 0.0,
    )
    return Decoded(out[:, 0])
