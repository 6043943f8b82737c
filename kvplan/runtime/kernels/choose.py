"""Which kernel runs: Triton on a GPU, else flash-attn where it fits, else plain torch.

`KVPLAN_KERNELS` names one instead: `torch`, `flash` (torch where it does not fit) or `triton`. Triton and flash-attn
are imported when first needed, never with kvplan.
"""

from __future__ import annotations

import importlib
import os
from functools import cache

import torch
from torch import Tensor

from kvplan.errors import RuntimeLimitError
from kvplan.runtime.kernels import flash, portable
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.encoded import Encoded
from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Sequences

SETTING = "KVPLAN_KERNELS"
SETTINGS = ("auto", "torch", "flash", "triton")
MAX_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def setting() -> str:
    """What `KVPLAN_KERNELS` asks for.

    Raises:
        RuntimeLimitError: it names no kernels.
    """
    wanted = os.environ.get(SETTING, "auto")
    if wanted not in SETTINGS:
        raise RuntimeLimitError(f"{SETTING} is '{wanted}'; it must be one of {', '.join(SETTINGS)}")
    return wanted


@cache
def _triton_imports() -> bool:
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def available(tensor: Tensor) -> bool:
    """Whether the Triton kernels run on this tensor's device and dtype.

    A GPU of compute capability 8.0 or later; `KVPLAN_KERNELS=triton` takes any device, for Triton's interpreter.

    Raises:
        RuntimeLimitError: Triton was asked for by name and is not installed.
    """
    wanted = setting()
    if wanted in ("torch", "flash") or tensor.dtype not in DTYPES:
        return False
    if wanted == "triton":
        if not _triton_imports():
            raise RuntimeLimitError(f"{SETTING} is 'triton', which is not installed: pip install 'kvplan[gpu]'")
        return True
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0) and _triton_imports()


def decode(
    q: Tensor, keys: Tensor, values: Tensor, seqs: Sequences, args: DecodeArgs, need_lse: bool = False
) -> Decoded:
    """Attention of one query token per sequence over its slots.

    Args:
        q: [N, G, Dk], one sequence per row and KV head.
        keys: [slots, Dk]; values: [slots, Dv]; contiguous, in the dtype of `q`.
        need_lse: Whether `lse` is needed, for `merge`.
    """
    if available(q) and max(keys.shape[-1], values.shape[-1]) <= MAX_DIM:
        from kvplan.runtime.kernels import triton_decode

        return triton_decode.decode(q, keys, values, seqs, args)
    if setting() != "torch" and flash.fits(q, keys, values, seqs, args, need_lse):
        return flash.decode(q, keys, values, seqs, args)
    return portable.decode(q, keys, values, seqs, args, need_lse)


def quantized_decode(q: Tensor, keys: Encoded, values: Encoded, seqs: Sequences, args: DecodeArgs) -> Decoded:
    """The same over slots that a codec holds; sequences start at whole units.

    Args:
        q: [N, G, Dk].
    """
    if available(q) and max(keys.dim, values.dim) <= MAX_DIM:
        from kvplan.runtime.kernels import triton_quantized

        decoded = triton_quantized.quantized_decode(q, keys, values, seqs, args)
        if decoded is not None:
            return decoded
    return portable.quantized_decode(q, keys, values, seqs, args)


def column_sums(q: Tensor, keys: Tensor, valid: Tensor, args: AttentionArgs, lse: Tensor | None = None) -> Tensor:
    """Attention mass that each key of a prompt receives from the prompt's queries, mean over the query group.

    Padded queries and keys give and take nothing.

    Args:
        q: [B, Hq, T, D] of the last T columns; keys: [B, Hkv, N, D]; valid: [B, N] bool.
        lse: [B, Hq, T] natural log-sum-exp of each query's logits, sinks included, where the attention returned it.

    Returns:
        [B, Hkv, N] float32 (float64 for float64 keys).
    """
    if available(q) and keys.dtype == q.dtype and keys.shape[-1] <= MAX_DIM:
        from kvplan.runtime.kernels import triton_columns

        return triton_columns.column_sums(q, keys, valid, args, lse)
    return portable.column_sums(q, keys, valid, args, lse)
