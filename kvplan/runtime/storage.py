"""Pool: the slots of one layer, rows of different sizes one after the other in flat buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of equal size, as views into the pool: `start` to `stop` of the batch.

    Attributes:
        keys, values: [b, Hkv, C, D] where C is the slots allocated per row.
        positions: [b, H, C] int32 or None; H is Hkv, or 1 with one set of tokens for all heads.
        scores: [b, H, C] float32 or None.
    """

    start: int
    stop: int
    keys: Tensor
    values: Tensor
    positions: Tensor | None
    scores: Tensor | None


class Pool:
    """Keys, values and, for score evictors, positions and scores.

    Args:
        sizes: Slots per row.
        like_keys: Any keys [*, Hkv, *, Dk] of this layer: gives heads, dims, dtype and device.
        like_values: Likewise for values.
        side_heads: Heads of the side arrays: 0 (none), 1 or Hkv.
    """

    def __init__(self, sizes: Sequence[int], like_keys: Tensor, like_values: Tensor, side_heads: int) -> None:
        self.sizes, self.heads, self.side_heads = list(sizes), like_keys.shape[1], side_heads
        slots = sum(self.sizes)
        self.keys = like_keys.new_zeros(slots * self.heads, like_keys.shape[-1])
        self.values = like_values.new_zeros(slots * self.heads, like_values.shape[-1])
        side = slots * side_heads
        self.positions = like_keys.new_zeros(side, dtype=torch.int32) if side_heads else None
        self.scores = like_keys.new_zeros(side, dtype=torch.float32) if side_heads else None
        self._starts = [0, *accumulate(self.sizes)]
        self._rows = self._view_rows()

    def _span(self, start: int, stop: int) -> Rows:
        size, b, low, high = self.sizes[start], stop - start, self._starts[start], self._starts[stop]
        heads, side = self.heads, self.side_heads

        def view(buffer: Tensor) -> Tensor:
            return buffer[low * heads : high * heads].view(b, heads, size, buffer.shape[-1])

        def side_view(buffer: Tensor | None) -> Tensor | None:
            return None if buffer is None else buffer[low * side : high * side].view(b, side, size)

        return Rows(start, stop, view(self.keys), view(self.values), side_view(self.positions), side_view(self.scores))

    def _view_rows(self) -> list[Rows]:
        spans, start = [], 0
        for stop in range(1, len(self.sizes) + 1):
            if stop == len(self.sizes) or self.sizes[stop] != self.sizes[start]:
                spans.append(self._span(start, stop))
                start = stop
        return spans

    @property
    def rows(self) -> list[Rows]:
        """The whole batch as runs of equally sized rows; one run when all rows have the same size."""
        return self._rows

    def row(self, index: int) -> Rows:
        return self._span(index, index + 1)

    def resized(self, sizes: Sequence[int], held: Sequence[int]) -> Pool:
        """A new pool with the first `held` slots of each row copied."""
        new = Pool(sizes, *self._likes(), self.side_heads)
        for index, count in enumerate(held):
            new.copy_row(index, self, index, count)
        return new

    def selected(self, indices: Sequence[int], held: Sequence[int]) -> Pool:
        """A new pool of the given rows, in that order; `held` is per new row."""
        new = Pool([self.sizes[i] for i in indices], *self._likes(), self.side_heads)
        for index, (source, count) in enumerate(zip(indices, held, strict=True)):
            new.copy_row(index, self, source, count)
        return new

    def copy_row(self, index: int, other: Pool, source: int, count: int) -> None:
        mine, theirs = self.row(index), other.row(source)
        mine.keys[:, :, :count] = theirs.keys[:, :, :count]
        mine.values[:, :, :count] = theirs.values[:, :, :count]
        if mine.positions is not None and mine.scores is not None:
            assert theirs.positions is not None and theirs.scores is not None
            mine.positions[..., :count] = theirs.positions[..., :count]
            mine.scores[..., :count] = theirs.scores[..., :count]

    def _likes(self) -> tuple[Tensor, Tensor]:
        return self.keys.view(-1, self.heads, 1, self.keys.shape[-1]), self.values.view(
            -1, self.heads, 1, self.values.shape[-1]
        )

    def bytes_by_kind(self) -> dict[str, int]:
        """Storage bytes really allocated."""
        buffers = {"keys": self.keys, "values": self.values, "positions": self.positions, "scores": self.scores}
        return {kind: 0 if t is None else t.untyped_storage().nbytes() for kind, t in buffers.items()}
