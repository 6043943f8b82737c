"""Slots and new tokens side by side: what a later turn and a chunk of the prompt attend over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.dense import Dense
from kvplan.runtime.kernels.parts import Part, Stored
from kvplan.runtime.storage import Pool


def side_by_side(pool: Pool, width: int, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns of the first `width` slots (rows that have fewer: zeros) and of new tokens: [B, H, width + T, ...].

    Where slots are encoded in units, `width` and T are whole units, and so are the columns.
    """
    columns, unit = {}, {column.name: column.tokens for column in pool.columns}
    for name, fresh in new.items():
        first = width // unit[name]
        both = fresh.new_zeros(*fresh.shape[:2], first + fresh.shape[2], *fresh.shape[3:])
        both[:, :, first:] = fresh
        for rows in pool.rows:
            old = rows.columns[name][:, :, :first]
            both[rows.start : rows.stop, :, : old.shape[2]] = old
        columns[name] = both
    return columns


def decoded(columns: Mapping[str, Tensor], role: str, codec: Codec, dim: int, dtype: torch.dtype) -> Tensor:
    """The keys or values of columns: [B, H, N, dim] of `dtype`."""
    codes = {n.removeprefix(f"{role}."): t for n, t in columns.items() if n.startswith(f"{role}.")}
    return codec.decode(codes, dim, dtype)


def dense_part(keys: Tensor, values: Tensor, counts: Tensor | None, mask: Tensor | None = None) -> Part:
    """One part of keys and values [B, H, N, D], dense for as long as the forward lasts; counts are [B, H, N]."""
    bias = None if counts is None else counts.clamp(min=1).float().log()
    stored = [Stored(Dense(), {"x": x}, x.shape[-1]) for x in (keys, values)]
    return Part(stored[0], stored[1], keys.shape[2], mask, bias)


def decoded_part(
    columns: Mapping[str, Tensor], key_codec: Codec, value_codec: Codec, key_dim: int, value_dim: int, like: Tensor
) -> Part:
    """The columns as one part that is dense for as long as the forward lasts."""
    keys = decoded(columns, "keys", key_codec, key_dim, like.dtype)
    return dense_part(keys, decoded(columns, "values", value_codec, value_dim, like.dtype), columns.get("counts"))


def chunk_mask(present: Tensor, positions: Tensor, num_new: int, window: int | None) -> Tensor:
    """[B, 1 or H, T, N] bool: each new token sees every slot, the tokens of its chunk up to itself, within the window.

    Args:
        present: [B, N] bool, False on padding and empty slots; the last `num_new` columns are the new tokens.
        positions: [B, H, N] int64.
    """
    N = present.shape[1]
    steps = torch.arange(num_new, device=present.device)[:, None]
    columns = torch.arange(N, device=present.device)
    causal = columns <= N - num_new + steps  # [T, N]
    mask = present[:, None, None] & causal
    if window is not None:
        mask = mask & (positions[:, :, None] > positions[:, :, N - num_new :, None] - window)
    # A padded query sees itself: a row of nothing is not a number.
    return mask | (columns == N - num_new + steps)


def pick(column: Tensor, order: Tensor) -> Tensor:
    """[Hc, N, ...] at [H, n] -> [Hc, n, ...]; one set of indices serves all heads when H is 1."""
    index = order.expand(column.shape[0], -1)
    if column.ndim == 3:
        index = index[..., None].expand(-1, -1, column.shape[-1])
    return column.gather(1, index)
