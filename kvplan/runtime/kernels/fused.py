"""One token per row over pool slots, handed to the fused decode kernels: the glue between parts and flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvplan.runtime.kernels import choose
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.encoded import Encoded
from kvplan.runtime.kernels.parts import Part, Stored
from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Probs, Sequences, merge

# A mask as a bias: finite, as kernels want it, and nothing after the exponential.
HIDDEN = -1e30


def attend_fused(
    q: Tensor, parts: Sequence[Part], args: AttentionArgs, want_probs: bool
) -> tuple[Tensor, Tensor | None] | None:
    """As `stored.attend_parts`, by the fused kernels; None where they do not run or the slots lie otherwise.

    Args:
        q: [b, Hq, 1, D].
    """
    if q.shape[2] != 1 or not choose.available(q):
        return None
    found = []
    for number, part in enumerate(parts):
        decoded = _decode(q, part, args, want_probs, first=number == 0, alone=len(parts) == 1)
        if decoded is None:
            return None
        found.append(decoded)
    whole = found[0] if len(found) == 1 else merge(found)
    b, heads = q.shape[0], _heads(parts[0])
    out = whole.out.unflatten(0, (b, heads)).flatten(1, 2)[:, None]  # [b, 1, Hq, Dv]
    return out, None if whole.probs is None else whole.probs.unflatten(0, (b, heads))[:, :, :, None]


def _decode(q: Tensor, part: Part, args: AttentionArgs, want_probs: bool, first: bool, alone: bool) -> Decoded | None:
    b, heads = q.shape[0], _heads(part)
    keys, values = _flat(part.keys), _flat(part.values)
    if keys is None or values is None or keys[1] != values[1]:
        return None
    size = keys[1]
    grouped = q.unflatten(1, (heads, -1))[:, :, :, 0]  # [b, Hkv, G, D]
    if part.channels is not None:
        grouped = grouped.gather(-1, part.channels[:, :, None].expand(-1, -1, grouped.shape[2], -1))
    starts = torch.arange(b * heads, device=q.device) * size
    seqs = Sequences(starts, torch.full_like(starts, part.slots, dtype=torch.int32), part.slots, even=size)
    sinks = None
    if args.sink_logits is not None and first:
        sinks = args.sink_logits.view(-1, heads, grouped.shape[2]).expand(b, -1, -1).flatten(0, 1)
    asked = DecodeArgs(
        args.scaling, args.softcap, sinks, _bias(part, b, heads, size), Probs.HEADS if want_probs else Probs.NONE
    )
    query = grouped.flatten(0, 1).contiguous()
    if part.keys.dense is not None and part.values.dense is not None:
        return choose.decode(query, keys[0]["x"], values[0]["x"], seqs, asked, need_lse=not alone)
    encoded = [Encoded(s.codec, flat[0], s.dim) for s, flat in ((part.keys, keys), (part.values, values))]
    return choose.quantized_decode(query, encoded[0], encoded[1], seqs, asked)


def _heads(part: Part) -> int:
    return next(iter(part.keys.codes.values())).shape[1]


def _flat(stored: Stored) -> tuple[dict[str, Tensor], int] | None:
    """The whole buffer [units, width] behind each view, and the slots from one head to the next."""
    flats, sizes = {}, set()
    for name, view in stored.codes.items():
        b, heads, _, width = view.shape
        if view.stride(3) != 1 or view.stride(2) != width or view.stride(0) != heads * view.stride(1):
            return None
        units = view.stride(1) // width
        flats[name] = view.as_strided((b * heads * units, width), (width, 1), view.storage_offset())
        sizes.add(units * stored.codec.group_tokens)
    return (flats, sizes.pop()) if len(sizes) == 1 else None


def _bias(part: Part, b: int, heads: int, size: int) -> Tensor | None:
    """[b * Hkv * size] float32 of hidden slots and of merged ones, or None."""
    if part.mask is None and part.bias is None:
        return None
    shape = (b, heads, part.slots)
    bias = torch.zeros(b, heads, size, device=next(iter(part.keys.codes.values())).device)
    if part.bias is not None:
        bias[..., : part.slots] = part.bias
    if part.mask is not None:
        bias[..., : part.slots].masked_fill_(~part.mask[:, :, 0].expand(shape), HIDDEN)
    return bias.flatten()
