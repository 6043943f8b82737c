# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles the kernels' source; annotations there mean something else to it.
"""Decode attention over encoded slots in Triton: codes are unpacked in registers, never written back decoded.

The launches are those of `triton_decode`; only the loading differs. Keys and values may be of different forms, so one
kernel serves `int8`, both halves of `kivi` and the codebooks of `turboquant`.

A program computes for each element which byte and which bits of it are its own, so a byte is asked for as often as it
holds codes, but by the same program at the same time: device memory sees it once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvplan.runtime.kernels.encoded import Encoded, Form, Layout, layout_of
from kvplan.runtime.kernels.triton_decode import (
    Scratch,
    Tile,
    _adjusted,
    _beginning,
    _finish,
    _leave,
    _online,
    _rows,
    _tile,
    chunk_slots,
    padded,
)
from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Sequences

DENSE = tl.constexpr(int(Form.DENSE))
PER_TOKEN = tl.constexpr(int(Form.PER_TOKEN))
PER_CHANNEL = tl.constexpr(int(Form.PER_CHANNEL))
VECTOR = tl.constexpr(int(Form.VECTOR))
LEVELS = tl.constexpr(int(Form.LEVELS))
FLOAT8 = tl.constexpr(int(Form.FLOAT8))
TILE = Tile(slots=64, warps=4, stages=3)
LOOKUP_TILE = Tile(slots=64, warps=4, stages=1)  # a pipeline would copy looked-up levels through shared memory


@triton.jit
def _bytes(codes, start, s, here, WIDTH: tl.constexpr, at):
    """Bytes `at` [1, W] of each slot, as int32 [SLOTS, W]."""
    return tl.load(codes + start * WIDTH + s[:, None] * WIDTH + at, mask=here, other=0).to(tl.int32)


@triton.jit
def _planes(codes, start, s, d, inside, D: tl.constexpr, BITS: tl.constexpr):
    """Codes of slots that stand alone [SLOTS, PAD]: byte i holds channels i, i + WIDTH, ...: one of each plane."""
    WIDTH: tl.constexpr = D * BITS // 8
    code = _bytes(codes, start, s, inside[:, None] & (d < D)[None, :], WIDTH, (d % WIDTH)[None, :])
    if BITS < 8:
        code = (code >> (BITS * (d // WIDTH))[None, :]) & (2**BITS - 1)
    return code


@triton.jit
def _per_token(
    codes, scales, minima, start, s, d, inside,
    D: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """[SLOTS, PAD] float32, several groups of channels per slot."""
    GROUPS: tl.constexpr = D // GROUP
    b = tl.arange(0, PAD // GROUP)
    at, there = (start + s)[:, None] * GROUPS + b[None, :], inside[:, None] & (b < GROUPS)[None, :]
    scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
    minimum = tl.load(minima + at, mask=there, other=0.0).to(tl.float32)
    code = _planes(codes, start, s, d, inside, D, BITS).to(tl.float32)
    grouped = tl.reshape(code, (SLOTS, PAD // GROUP, GROUP))
    return tl.reshape(grouped * scale[:, :, None] + minimum[:, :, None], (SLOTS, PAD))


@triton.jit
def _per_channel(
    codes, scales, minima, start, first, end, s, d, inside,
    D: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """[SLOTS, PAD] float32. A unit of GROUP slots is LINES lines of D bytes; line i holds slots i, i + LINES, ..."""
    LINES: tl.constexpr = GROUP * BITS // 8
    UNITS: tl.constexpr = SLOTS // GROUP if SLOTS > GROUP else 1
    here = inside[:, None] & (d < D)[None, :]
    r = s % GROUP
    line = (s // GROUP) * LINES + r % LINES
    code = tl.load(codes + start * (D * BITS // 8) + line[:, None] * D + d[None, :], mask=here, other=0).to(tl.int32)
    if BITS < 8:
        code = (code >> (BITS * (r // LINES))[:, None]) & (2**BITS - 1)
    u = first // GROUP + tl.arange(0, UNITS)
    at, there = (start // GROUP + u)[:, None] * D + d[None, :], (u * GROUP < end)[:, None] & (d < D)[None, :]
    scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
    minimum = tl.load(minima + at, mask=there, other=0.0).to(tl.float32)
    grouped = tl.reshape(code.to(tl.float32), (UNITS, SLOTS // UNITS, PAD))
    return tl.reshape(grouped * scale[:, None, :] + minimum[:, None, :], (SLOTS, PAD))


@triton.jit
def _place(word, j: tl.constexpr, BITS: tl.constexpr):
    """Code `j` of each word. At 3 bits a word is a byte of four pairs of low bits with the four top bits above."""
    if BITS == 3:
        code = ((word >> 2 * j) & 3) | (((word >> (8 + j)) & 1) << 2)
    else:
        code = (word >> BITS * j) & (2**BITS - 1)
    return code


@triton.jit
def _levels(codes, tops, table, start, s, inside, D: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr):
    """Bare levels [SLOTS, PAD] float32. Neighbouring channels share a byte, the first in its lowest bits."""
    COUNT: tl.constexpr = 2 if BITS == 4 else 4
    w = tl.arange(0, PAD // COUNT)
    here = inside[:, None] & (w < D // COUNT)[None, :]
    word = _bytes(codes, start, s, here, D // COUNT, w[None, :])
    if BITS == 3:
        top = _bytes(tops, start, s, here, D // 8, (w // 2)[None, :])
        word = word | (((top >> (4 * (w % 2))[None, :]) & 15) << 8)
    if COUNT == 2:
        code = tl.interleave(_place(word, 0, BITS), _place(word, 1, BITS))
    else:
        even = tl.interleave(_place(word, 0, BITS), _place(word, 2, BITS))
        odd = tl.interleave(_place(word, 1, BITS), _place(word, 3, BITS))
        code = tl.interleave(even, odd)
    d = tl.arange(0, PAD)
    return tl.where((d < D)[None, :], tl.load(table + code), 0.0)


@triton.jit
def _float8(codes, start, s, d, inside, D: tl.constexpr, EXPONENT: tl.constexpr):
    """Bare numbers [SLOTS, PAD] float32: the bits moved to where float16 has them, its exponent bias and all."""
    byte = _bytes(codes, start, s, inside[:, None] & (d < D)[None, :], D, d[None, :])
    wide = ((byte & 128) << 8) | ((byte & 127) << (3 + EXPONENT))
    return wide.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _read(
    codes, scales, extras, tops, start, first, end, s, d, inside,
    FORM: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SLOTS: tl.constexpr, like,
):  # fmt: skip
    """Slots of a sequence [SLOTS, PAD] in the dtype of `like`; bare numbers for forms with one scale per slot.

    0 beyond D, finite outside; `s` counts from `start`. Codes of whole vectors are centred around 0: the smaller the
    numbers, the less is lost when weights are rounded to 16 bits.
    """
    if FORM == DENSE:
        x = _tile(codes + start * D, s, d, inside, D)
    elif FORM == PER_TOKEN:
        x = _per_token(codes, scales, extras, start, s, d, inside, D, PAD, BITS, GROUP, SLOTS)
    elif FORM == PER_CHANNEL:
        x = _per_channel(codes, scales, extras, start, first, end, s, d, inside, D, PAD, BITS, GROUP, SLOTS)
    elif FORM == VECTOR:
        x = tl.where((d < D)[None, :], _planes(codes, start, s, d, inside, D, BITS) - 2 ** (BITS - 1), 0).to(tl.float32)
    elif FORM == LEVELS:
        x = _levels(codes, tops, extras, start, s, inside, D, PAD, BITS)
    else:
        x = _float8(codes, start, s, d, inside, D, BITS)
    return x.to(like.dtype)


@triton.jit
def _slot_scale(scales, start, s, inside, factor):
    """What one slot's bare numbers are multiplied with: [SLOTS] float32."""
    return tl.load(scales + start + s, mask=inside, other=0.0).to(tl.float32) * factor


@triton.jit
def _slot_centre(scale, minima, start, s, inside, BITS: tl.constexpr):
    """What centred codes are counted from: [SLOTS] float32."""
    return tl.load(minima + start + s, mask=inside, other=0.0).to(tl.float32) + scale * 2 ** (BITS - 1)


@triton.jit
def _split_kernel(
    q, key_codes, key_scales, key_extras, key_tops, value_codes, value_scales, value_extras, value_tops,
    starts, held, sinks, bias,
    out, lse, logits, scaling, softcap, key_factor, value_factor, longest, chunk,
    G: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    KEY_FORM: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_FORM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    SINKS: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """One chunk of one sequence."""
    n, part = tl.program_id(0), tl.program_id(1)
    g, dk, dv = tl.arange(0, ROWS), tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    start = tl.load(starts + n).to(tl.int64)
    begin = part * chunk
    end = tl.minimum(begin + chunk, tl.load(held + n))
    queries = _rows(q, n, g, dk, G, KEY_DIM)
    highest, total = _beginning(sinks, n, g, part, G, ROWS, SINKS)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    query_sums = tl.sum(queries.to(tl.float32), 1)
    for first in range(begin, end, SLOTS):
        s = first + tl.arange(0, SLOTS)
        inside = s < end
        k = _read(
            key_codes, key_scales, key_extras, key_tops, start, first, end, s, dk, inside,
            KEY_FORM, KEY_DIM, KEY_PAD, KEY_BITS, KEY_GROUP, SLOTS, queries,
        )  # fmt: skip
        x = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if KEY_FORM >= VECTOR:
            scale = _slot_scale(key_scales, start, s, inside, key_factor)
            x = x * scale[None, :]
            if KEY_FORM == VECTOR:
                centre = _slot_centre(scale, key_extras, start, s, inside, KEY_BITS)
                x += query_sums[:, None] * centre[None, :]
        x = _adjusted(x, bias, start + s, inside, scaling, softcap, CAP, BIAS)
        if LOGITS:
            _leave(x, logits, n, g, s, inside, longest, G)
        p, shrink, highest, total = _online(x, highest, total)
        v = _read(
            value_codes, value_scales, value_extras, value_tops, start, first, end, s, dv, inside,
            VALUE_FORM, VALUE_DIM, VALUE_PAD, VALUE_BITS, VALUE_GROUP, SLOTS, queries,
        )  # fmt: skip
        acc = acc * shrink[:, None]
        if VALUE_FORM >= VECTOR:
            scale = _slot_scale(value_scales, start, s, inside, value_factor)
            if VALUE_FORM == VECTOR:
                centre = _slot_centre(scale, value_extras, start, s, inside, VALUE_BITS)
                acc += tl.sum(p * centre[None, :], 1)[:, None]
            p = p * scale[None, :]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    _finish(out, lse, acc, highest, total, n, part, tl.num_programs(1), g, dv, G, VALUE_DIM)


def quantized_decode(
    q: Tensor, keys: Encoded, values: Encoded, seqs: Sequences, args: DecodeArgs, tile: Tile | None = None
) -> Decoded | None:
    """As `portable.quantized_decode`, for contiguous buffers; None where a codec has no fused layout.

    Products are taken in the dtype of the queries, from numbers decoded in float32. Rotated codecs are never turned
    back: the query is turned before and the output after, each once.

    Args:
        q: [N, G, Dk].
    """
    key, value = layout_of(keys), layout_of(values)
    if key is None or value is None:
        return None
    tile = tile or (LOOKUP_TILE if Form.LEVELS in (key.form, value.form) else TILE)
    turned = q if key.rotation is None else (q.float() @ key.rotation.mT).to(q.dtype)
    scratch = Scratch(
        seqs, args, turned.contiguous(), values.dim, chunk_slots(seqs, _whole(tile, keys, values), q.device)
    )
    spare = scratch.lse
    _split_kernel[scratch.grid](
        scratch.q,
        *_buffers(key, spare),
        *_buffers(value, spare),
        seqs.starts,
        seqs.held,
        spare if args.sink_logits is None else args.sink_logits.contiguous(),
        spare if args.bias is None else args.bias,
        scratch.parts_out,
        scratch.parts_lse,
        scratch.logits,
        args.scaling,
        args.softcap or 0.0,
        key.factor,
        value.factor,
        seqs.longest,
        scratch.chunk,
        SLOTS=tile.slots,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_form("KEY", key, keys.dim),
        **_form("VALUE", value, values.dim),
        **scratch.flags(),
    )
    decoded = scratch.finish()
    if value.rotation is None:
        return decoded
    return Decoded((decoded.out.float() @ value.rotation).to(q.dtype), decoded.lse, decoded.probs)


def _whole(tile: Tile, keys: Encoded, values: Encoded) -> Tile:
    """A tile of at least one unit: chunks must not cut one."""
    return Tile(max(tile.slots, keys.unit_slots, values.unit_slots), tile.warps, tile.stages)


def _buffers(layout: Layout, spare: Tensor) -> list[Tensor]:
    return [spare if x is None else x for x in (layout.codes, layout.scales, layout.extras, layout.tops)]


def _form(role: str, layout: Layout, dim: int) -> dict[str, Any]:
    return {
        f"{role}_FORM": int(layout.form),
        f"{role}_DIM": dim,
        f"{role}_PAD": padded(dim),
        f"{role}_BITS": layout.bits,
        f"{role}_GROUP": layout.group,
    }
