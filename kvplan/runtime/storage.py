"""Pool: the slots of one layer, rows of different sizes one after the other in flat buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from kvplan.methods.codecs import Codes
from kvplan.policy.layout import KINDS, Column

SIDE = ("positions", "scores", "counts")


@dataclass(frozen=True)
class Rows:
    """Rows of equal size, as views into the pool: `start` to `stop` of the batch.

    Attributes:
        columns: By name, [b, H, C / tokens of a unit, width] where C is the slots allocated per row; side arrays
            (positions, scores, counts) are [b, H, C].
    """

    start: int
    stop: int
    columns: Mapping[str, Tensor]

    @property
    def positions(self) -> Tensor:
        """[b, H, C] int32; H is Hkv, or 1 with one set of tokens for all heads."""
        return self.columns["positions"]

    @property
    def scores(self) -> Tensor:
        """[b, H, C] float32."""
        return self.columns["scores"]

    def codes(self, role: str, slots: int | None = None, tokens: int = 1) -> Codes:
        """The stored keys or values, of the first `slots` slots (all by default) in units of `tokens`."""
        prefix, units = f"{role}.", None if slots is None else -(-slots // tokens)
        return {n.removeprefix(prefix): t[:, :, :units] for n, t in self.columns.items() if n.startswith(prefix)}


class Pool:
    """The columns of a layer's slots.

    Args:
        columns: What is stored.
        sizes: Slots per row; whole units.
        device: Where.
    """

    def __init__(self, columns: Sequence[Column], sizes: Sequence[int], device: torch.device) -> None:
        self.columns, self.sizes, self.device = tuple(columns), list(sizes), device
        slots = sum(self.sizes)
        self.buffers = {
            c.name: torch.zeros(slots // c.tokens * c.heads, c.width, dtype=c.dtype, device=device)
            for c in self.columns
        }
        self._starts = [0, *accumulate(self.sizes)]
        self._rows = self._view_rows()
        self._first_slots: dict[int, Tensor] = {}

    def span(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, which must be of one size."""
        size, b, low, high = self.sizes[start], stop - start, self._starts[start], self._starts[stop]
        views = {}
        for c in self.columns:
            part = self.buffers[c.name][low // c.tokens * c.heads : high // c.tokens * c.heads]
            shape = (b, c.heads, size // c.tokens)
            views[c.name] = part.view(shape) if c.name in SIDE else part.view(*shape, c.width)
        return Rows(start, stop, views)

    def _view_rows(self) -> list[Rows]:
        spans, start = [], 0
        for stop in range(1, len(self.sizes) + 1):
            if stop == len(self.sizes) or self.sizes[stop] != self.sizes[start]:
                spans.append(self.span(start, stop))
                start = stop
        return spans

    @property
    def rows(self) -> list[Rows]:
        """The whole batch as runs of equally sized rows; one run when all rows have the same size."""
        return self._rows

    def row(self, index: int) -> Rows:
        return self.span(index, index + 1)

    def put(self, slots: int | Tensor, new: Mapping[str, Tensor]) -> None:
        """Write one slot per row, in pools whose slots stand alone.

        Args:
            slots: One for all rows, or [B, H or 1].
            new: By column, [B, H, 1, ...].
        """
        if isinstance(slots, int) and len(self.rows) == 1:
            for name, x in new.items():
                put(self.rows[0].columns[name], slots, x)
            return
        index = {heads: (self._firsts(heads) + slots).flatten() for heads in {c.heads for c in self.columns}}
        for c in self.columns:
            if c.name in new:
                fresh = as_bytes(new[c.name]).reshape(-1, c.width)
                as_bytes(self.buffers[c.name]).index_copy_(0, index[c.heads], fresh)

    def _firsts(self, heads: int) -> Tensor:
        """[B, heads] int64: where each row's and head's slots begin in a buffer."""
        if heads not in self._first_slots:
            starts = torch.tensor(self._starts[:-1])[:, None] * heads
            firsts = starts + torch.tensor(self.sizes)[:, None] * torch.arange(heads)
            self._first_slots[heads] = firsts.to(self.device)
        return self._first_slots[heads]

    def wide(self, name: str, fill: int = 0) -> Tensor:
        """A side array of all rows, [B, H, slots of the largest]: a view where rows are of one size, else a copy."""
        if len(self.rows) == 1:
            return self.rows[0].columns[name]
        flat, heads = self.buffers[name].view(-1), self.rows[0].columns[name].shape[1]
        wide = flat.new_full((len(self.sizes), heads, max(self.sizes)), fill)
        wide.view(-1).index_copy_(0, side_by_side(tuple(self.sizes), heads, self.device), flat)
        return wide

    def put_wide(self, name: str, new: Tensor) -> None:
        """Store the first slots of a side array of all rows, [B, H, S]."""
        if len(self.rows) > 1 and new.shape[-1] == max(self.sizes):
            places = side_by_side(tuple(self.sizes), new.shape[1], self.device)
            self.buffers[name].view(-1).copy_(new.reshape(-1)[places])
            return
        for rows in self.rows:
            column = rows.columns[name][..., : new.shape[-1]]
            column.copy_(new[rows.start : rows.stop, :, : column.shape[-1]])

    def resized(self, sizes: Sequence[int]) -> Pool:
        """A new pool with as many slots of each row copied as fit."""
        return self.selected(range(len(self.sizes)), sizes)

    def selected(self, indices: Sequence[int], sizes: Sequence[int] | None = None) -> Pool:
        """A new pool of the given rows, in that order."""
        new = Pool(self.columns, [self.sizes[i] for i in indices] if sizes is None else sizes, self.device)
        for index, source in enumerate(indices):
            mine, theirs = new.row(index).columns, self.row(source).columns
            for name, target in mine.items():
                units = min(target.shape[2], theirs[name].shape[2])
                target[:, :, :units] = theirs[name][:, :, :units]
        return new

    def bytes_by_kind(self) -> dict[str, int]:
        """Storage bytes really allocated."""
        held = dict.fromkeys(KINDS, 0)
        for column in self.columns:
            held[column.kind] += self.buffers[column.name].untyped_storage().nbytes()
        return held

    def row_bytes(self, index: int) -> int:
        """Bytes of one row's part of the buffers."""
        return sum(t.numel() * t.element_size() for t in self.row(index).columns.values())


@lru_cache(maxsize=16)  # layers of a forward lie alike
def side_by_side(sizes: tuple[int, ...], heads: int, device: torch.device) -> Tensor:
    """Where the slots of a flat side array go when rows of these sizes lie side by side, as wide as the largest.

    Returns:
        [slots * heads] int64, into [B, heads, largest]. Not to be written to.
    """
    with torch.inference_mode(False):
        starts = [i * max(sizes) for i in range(len(sizes) * heads)]
        return torch.cat([torch.arange(start, start + sizes[i // heads]) for i, start in enumerate(starts)]).to(device)


def put(column: Tensor, slots: int | Tensor, new: Tensor) -> None:
    """Write one slot per row: [b, H, 1, ...] into [b, H, C, ...] at one slot for all, [b] slots, or [b, H, 1]."""
    column, new = as_bytes(column), as_bytes(new)
    if isinstance(slots, int):
        column[:, :, slots] = new[:, :, 0]
    elif slots.ndim == 1:
        column[torch.arange(len(slots), device=slots.device), :, slots] = new[:, :, 0]
    else:
        index = slots.expand(-1, column.shape[1], -1)
        if column.ndim == 4:
            index = index[..., None].expand(-1, -1, -1, column.shape[-1])
        column.scatter_(2, index, new)


def as_bytes(x: Tensor) -> Tensor:
    """8-bit floats cannot be indexed everywhere; their bytes can."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x
