# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles the kernels' source; annotations there mean something else to it.
"""Decode attention over sequences of unequal length, split over slots (flash-decoding), in Triton.

Dao et al. 2023 ("Flash-Decoding for long-context inference"): one query token gives too few programs to fill a GPU, so
every sequence is cut into chunks of slots whose partial results are joined by their log-sum-exps. Two things are ours:
the group's queries are the rows of one matrix product (padded to the smallest tile, which still leaves the matrix units
mostly idle), so that a key is read once for all of them, and the logits are
left behind for score evictors, who need each slot's probability and not only the output.

Three launches at most: `_split_kernel` (all the reading), `_join_kernel` (only with more than one chunk) and
`_probs_kernel` (only when probabilities are wanted). Nothing here asks the device for a length, so a decode step can be
captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Probs, Sequences

MAX_CHUNKS = 128
MIN_CHUNK_SLOTS = 128
PROGRAMS_PER_PROCESSOR = 4
PROBS_BLOCK = 256
MIN_DOT_ROWS = 16  # the smallest tile of a matrix unit


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Args:
        slots: Slots per loop step; a power of two, at least 16.
        warps: Warps per program.
        stages: Depth of the software pipeline.
    """

    slots: int
    warps: int = 4
    stages: int = 3


def tile_for(key_dim: int, value_dim: int, element_bytes: int) -> Tile:
    """About 32 KiB of keys and values in flight per stage, whatever the head size. A guess to be tuned on hardware."""
    row_bytes = (padded(key_dim) + padded(value_dim)) * element_bytes
    return Tile(slots=max(16, min(128, 32 * 1024 // row_bytes)))


def padded(dim: int) -> int:
    """The power of two that holds `dim` channels; at least 16."""
    return max(16, triton.next_power_of_2(dim))


def chunk_slots(seqs: Sequences, tile: Tile, device: torch.device) -> int:
    """Slots per chunk: enough programs to fill the device, none smaller than is worth a launch."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    programs = max(1, PROGRAMS_PER_PROCESSOR * processors // max(len(seqs), 1))
    most = min(programs, MAX_CHUNKS)
    chunk = max(triton.cdiv(seqs.longest, most), MIN_CHUNK_SLOTS)
    return int(triton.cdiv(chunk, tile.slots) * tile.slots)


@triton.jit
def _rows(q, n, g, d, G: tl.constexpr, D: tl.constexpr):
    """The group's queries [ROWS, PADDED]; 0 beyond G and D."""
    return tl.load(q + (n * G + g[:, None]) * D + d[None, :], mask=(g[:, None] < G) & (d[None, :] < D), other=0.0)


@triton.jit
def _tile(slots, s, d, inside, D: tl.constexpr):
    """Some slots of a sequence: [slots, PADDED], 0 where not inside and beyond D."""
    return tl.load(slots + s[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _beginning(sinks, n, g, part, G: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr):
    """Running maximum and sum [ROWS] of the online softmax before any slot: the first chunk already holds the sink."""
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        sink = tl.load(sinks + n * G + g, mask=g < G, other=float("-inf")).to(tl.float32)
        highest = tl.where(part == 0, sink, highest)
        total = tl.where((part == 0) & (g < G), 1.0, 0.0)
    return highest, total


@triton.jit
def _online(x, highest, total):
    """One step of the online softmax over logits [ROWS, slots], at least one of them finite.

    Returns the weights under the new maximum, the factor for what was summed before, the new maximum and sum.
    """
    new = tl.maximum(highest, tl.max(x, 1))
    p, shrink = tl.exp(x - new[:, None]), tl.exp(highest - new)
    return p, shrink, new, total * shrink + tl.sum(p, 1)


@triton.jit
def _adjusted(x, bias, slot, inside, scaling, softcap, CAP: tl.constexpr, BIAS: tl.constexpr):
    """Logits of products [ROWS, slots]: scaled, soft-capped, biased; -inf outside. `slot` counts in the buffer."""
    x = x * scaling
    if CAP:
        # tanh by way of the exponential; its argument is never positive, so it cannot overflow.
        y = tl.abs(x) * (2.0 / softcap)
        e = tl.exp(-y)
        tanh = (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0, -tanh, tanh) * softcap
    if BIAS:
        x += tl.load(bias + slot, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], x, float("-inf"))


@triton.jit
def _leave(x, logits, n, g, s, inside, longest, G: tl.constexpr):
    """Leave logits [ROWS, slots] behind for the probabilities."""
    at = logits + (n.to(tl.int64) * G + g[:, None]) * longest + s[None, :]
    tl.store(at, x, mask=(g[:, None] < G) & inside[None, :])


@triton.jit
def _finish(out, lse, acc, highest, total, n, part, parts, g, d, G: tl.constexpr, D: tl.constexpr):
    """Store one chunk's output and log-sum-exp; zeros and -inf for a chunk without slots."""
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    row = (n * parts + part) * G + g
    tl.store(out + row[:, None].to(tl.int64) * D + d[None, :], acc, mask=(g[:, None] < G) & (d[None, :] < D))
    tl.store(lse + row, tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=g < G)


@triton.jit
def _split_kernel(
    q,
    keys,
    values,
    starts,
    held,
    sinks,
    bias,
    out,
    lse,
    logits,
    scaling,
    softcap,
    longest,
    chunk,
    G: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    SINKS: tl.constexpr,
    CAP: tl.constexpr,
    BIAS: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """One chunk of one sequence."""
    n, part = tl.program_id(0), tl.program_id(1)
    g, dk, dv = tl.arange(0, ROWS), tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    start = tl.load(starts + n).to(tl.int64)
    begin = part * chunk
    end = tl.minimum(begin + chunk, tl.load(held + n))
    queries = _rows(q, n, g, dk, G, KEY_DIM)
    my_keys, my_values = keys + start * KEY_DIM, values + start * VALUE_DIM
    highest, total = _beginning(sinks, n, g, part, G, ROWS, SINKS)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for first in range(begin, end, SLOTS):
        s = first + tl.arange(0, SLOTS)
        inside = s < end
        k = _tile(my_keys, s, dk, inside, KEY_DIM)
        x = tl.dot(queries, tl.trans(k), input_precision="ieee")
        x = _adjusted(x, bias, start + s, inside, scaling, softcap, CAP, BIAS)
        if LOGITS:
            _leave(x, logits, n, g, s, inside, longest, G)
        p, shrink, highest, total = _online(x, highest, total)
        v = _tile(my_values, s, dv, inside, VALUE_DIM)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    _finish(out, lse, acc, highest, total, n, part, tl.num_programs(1), g, dv, G, VALUE_DIM)


@triton.jit
def _join_kernel(
    parts_out, parts_lse, out, lse, parts, G: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr
):
    """Join the chunks of one sequence and query head."""
    n, g = tl.program_id(0), tl.program_id(1)
    d, i = tl.arange(0, PAD), tl.arange(0, PARTS)
    base = n * parts * G + g
    all_lse = tl.load(parts_lse + base + i * G, mask=i < parts, other=float("-inf"))
    highest = tl.max(all_lse, 0)
    finite = tl.where(highest > float("-inf"), highest, 0.0)
    total = tl.sum(tl.exp(all_lse - finite), 0)
    joined = tl.where(total > 0, finite + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    acc = tl.zeros([PAD], tl.float32)
    for first in range(0, parts, 16):
        j = first + tl.arange(0, 16)
        weights = tl.exp(tl.load(parts_lse + base + j * G, mask=j < parts, other=float("-inf")) - finite)
        at = parts_out + (base + j * G)[:, None].to(tl.int64) * D + d[None, :]
        acc += tl.sum(tl.load(at, mask=(j[:, None] < parts) & (d[None, :] < D), other=0.0) * weights[:, None], 0)
    tl.store(out + (n * G + g).to(tl.int64) * D + d, acc / tl.where(total > 0, total, 1.0), mask=d < D)
    tl.store(lse + n * G + g, joined)


@triton.jit
def _probs_kernel(
    logits, lse, held, probs, longest, G: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, MEAN: tl.constexpr
):
    """Logits to probabilities, 0 beyond what a sequence holds; per head (may be in place) or their mean."""
    n = tl.program_id(0)
    s, g = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS), tl.arange(0, ROWS)
    rows = n.to(tl.int64) * G + g
    inside = (g[:, None] < G) & (s[None, :] < tl.load(held + n))
    x = tl.load(logits + rows[:, None] * longest + s[None, :], mask=inside, other=float("-inf"))
    whole = tl.load(lse + rows, mask=g < G, other=0.0)
    p = tl.exp(x - tl.where(whole > float("-inf"), whole, 0.0)[:, None])  # exp(-inf) = 0 outside
    if MEAN:
        tl.store(probs + n.to(tl.int64) * longest + s, tl.sum(p, 0) / G, mask=s < longest)
    else:
        tl.store(probs + rows[:, None] * longest + s[None, :], p, mask=(g[:, None] < G) & (s[None, :] < longest))


@dataclass
class Scratch:
    """The buffers of one launch and the arguments that every split kernel takes.

    Partial results are float32; with a single chunk they are the final ones, in the dtype of the queries.
    """

    seqs: Sequences
    args: DecodeArgs
    q: Tensor
    value_dim: int
    chunk: int

    def __post_init__(self) -> None:
        N, G, _ = self.q.shape
        self.parts = max(1, int(triton.cdiv(self.seqs.longest, self.chunk)))
        self.out = self.q.new_empty(N, G, self.value_dim)
        self.lse = self.q.new_empty(N, G, dtype=torch.float32)
        single = self.parts == 1
        shape = (N, self.parts, G)
        self.parts_out = self.out if single else self.q.new_empty(*shape, self.value_dim, dtype=torch.float32)
        self.parts_lse = self.lse if single else self.q.new_empty(*shape, dtype=torch.float32)
        self.wants_logits = self.args.probs is not Probs.NONE
        self.logits = self.q.new_empty(N, G, self.seqs.longest, dtype=torch.float32) if self.wants_logits else self.lse

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.seqs), self.parts

    @property
    def rows(self) -> int:
        return max(MIN_DOT_ROWS, int(triton.next_power_of_2(self.q.shape[1])))

    def flags(self) -> dict[str, Any]:
        args = self.args
        return {
            "G": self.q.shape[1],
            "ROWS": self.rows,
            "SINKS": args.sink_logits is not None,
            "CAP": args.softcap is not None,
            "BIAS": args.bias is not None,
            "LOGITS": self.wants_logits,
        }

    def finish(self) -> Decoded:
        """Join the chunks and normalise what score evictors asked for."""
        N, G, _ = self.q.shape
        if self.parts > 1:
            _join_kernel[(N, G)](
                self.parts_out,
                self.parts_lse,
                self.out,
                self.lse,
                self.parts,
                G=G,
                D=self.value_dim,
                PAD=padded(self.value_dim),
                PARTS=triton.next_power_of_2(self.parts),
            )
        if not self.wants_logits:
            return Decoded(self.out, self.lse)
        mean, longest = self.args.probs is Probs.MEAN, self.seqs.longest
        probs = self.q.new_empty(N, longest, dtype=torch.float32) if mean else self.logits
        _probs_kernel[(N, triton.cdiv(longest, PROBS_BLOCK))](
            self.logits,
            self.lse,
            self.seqs.held,
            probs,
            longest,
            G=G,
            ROWS=triton.next_power_of_2(G),
            SLOTS=PROBS_BLOCK,
            MEAN=mean,
        )
        return Decoded(self.out, self.lse, probs)


def decode(
    q: Tensor, keys: Tensor, values: Tensor, seqs: Sequences, args: DecodeArgs, tile: Tile | None = None
) -> Decoded:
    """As `reference.decode`, for contiguous float16, bfloat16 or float32 tensors.

    Args:
        q: [N, G, Dk]; keys: [slots, Dk]; values: [slots, Dv], head dims multiples of 16 up to 256.
        tile: How a program works, when the default is not wanted.
    """
    tile = tile or tile_for(keys.shape[-1], values.shape[-1], keys.element_size())
    scratch = Scratch(seqs, args, q.contiguous(), values.shape[-1], chunk_slots(seqs, tile, q.device))
    _split_kernel[scratch.grid](
        scratch.q,
        keys,
        values,
        seqs.starts,
        seqs.held,
        scratch.lse if args.sink_logits is None else args.sink_logits.contiguous(),
        scratch.lse if args.bias is None else args.bias,
        scratch.parts_out,
        scratch.parts_lse,
        scratch.logits,
        args.scaling,
        args.softcap or 0.0,
        seqs.longest,
        scratch.chunk,
        KEY_DIM=keys.shape[-1],
        VALUE_DIM=values.shape[-1],
        KEY_PAD=padded(keys.shape[-1]),
        VALUE_PAD=padded(values.shape[-1]),
        SLOTS=tile.slots,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **scratch.flags(),
    )
    return scratch.finish()
