"""Pool: the slots of one layer, rows of different sizes one after the other in flat buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
