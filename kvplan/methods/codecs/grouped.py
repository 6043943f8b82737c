"""Grouped integers with one scale and one minimum per quant group: the arithmetic under `int8` and `kivi`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import ClassVar

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.codecs.base import Codec, Codes, Field
from kvplan.methods.codecs.packing import (
    joined,
    pack,
    unit_blocks,
    unpack,
    unpack_planes,
    weighted_blocks,
    working_dtype,
)

SCALE_DTYPE = torch.float16  # bfloat16 has 8 bits of mantissa: a minimum of 20 would be off by half a step of 0.1
SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0
FOLD_ROWS = 32  # with more queries than this, scaling a block of codes once is cheaper than scaling every query


def quantize(
    x: Tensor, bits: int, dim: int = -1, scale_dtype: torch.dtype = SCALE_DTYPE
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups that lie along `dim` to evenly spaced levels between their minimum and maximum.

    The scale and the minimum are rounded to `scale_dtype` before the codes are computed, so that encoding and decoding
    agree on the levels. A constant group has code 0 and decodes to its rounded minimum.

    Returns:
        Codes, uint8 of the shape of `x`; scales and minima of `scale_dtype`, with length 1 along `dim`.
    """
    x = x.to(working_dtype(x.dtype))
    levels = 2**bits - 1
    limit = torch.finfo(scale_dtype).max
    minimum = x.amin(dim, keepdim=True).clamp(-limit, limit).to(scale_dtype)
    base = minimum.to(x.dtype)
    scale = ((x.amax(dim, keepdim=True) - base) / levels).clamp(SMALLEST_SCALE, limit).to(scale_dtype)
    codes = ((x - base) / scale.to(x.dtype)).clamp(0, levels).round().to(torch.uint8)
    return codes, scale, minimum


@dataclass(frozen=True)
class Run:
    """Neighbouring channels of one quant group in one plane, and where in the plane they are."""

    channels: slice
    group: int
    plane: int
    within: slice


@lru_cache
def runs(dim: int, group: int, plane: int) -> tuple[Run, ...]:
    """The channels of a vector in order, cut where a quant group or a plane ends; both are lengths in channels."""
    cuts = sorted({*range(0, dim, group), *range(0, dim, plane), dim})
    return tuple(
        Run(slice(a, b), a // group, a // plane, slice(a % plane, a % plane + b - a))
        for a, b in itertools.pairwise(cuts)
    )


@dataclass(frozen=True, kw_only=True)
class PerToken(Codec):
    """A quant group is `group_channels` neighbouring channels of one token: each slot stands alone.

    Stored per slot: codes uint8 [D * bits / 8], packed by planes along the channels; scales and minima float16
    [D / group_channels].

    Args:
        bits: Bits of a code: 2, 4 or 8.
        group_channels: Channels on one scale; a vector with fewer is one group. None: the whole vector.
        residual: The most recent tokens that are kept as they are.
        setting: The parameter that an error about `group_channels` names.

    Raises:
        MethodError: the vectors do not split into groups or bytes.
    """

    name: ClassVar[str] = "per-token"
    bits: int
    group_channels: int | None
    residual: int = 0
    setting: str = "group_channels"

    @property
    def residual_tokens(self) -> int:
        return self.residual

    def _group(self, dim: int) -> int:
        return dim if self.group_channels is None else min(self.group_channels, dim)

    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        group = self._group(dim)
        if dim % group:
            raise MethodError(f"{self.setting} is {group}, which does not divide vectors of {dim} channels")
        if dim * self.bits % 8:
            raise MethodError(f"{self.bits}-bit codes of {dim} channels do not fill whole bytes; use 8 bits")
        groups = dim // group
        return {
            "codes": Field(dim * self.bits // 8, torch.uint8),
            "scales": Field(groups, SCALE_DTYPE, is_scale=True),
            "minima": Field(groups, SCALE_DTYPE, is_scale=True),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        grouped = x.unflatten(-1, (-1, self._group(x.shape[-1])))  # [..., N, D / group, group]
        codes, scales, minima = quantize(grouped, self.bits)
        return {
            "codes": pack(codes.flatten(-2), self.bits),
            "scales": scales.squeeze(-1),
            "minima": minima.squeeze(-1),
        }

    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        work = working_dtype(dtype)
        grouped = unpack(codes["codes"], self.bits).to(work).unflatten(-1, (-1, self._group(dim)))
        grouped = grouped * codes["scales"].to(work)[..., None] + codes["minima"].to(work)[..., None]
        return grouped.flatten(-2).to(dtype)

    def dot(self, q: Tensor, codes: Codes) -> Tensor:
        """Products with the bare codes of each quant group, scaled and shifted afterwards."""
        D = q.shape[-1]
        group = self._group(D)
        work = q.to(working_dtype(q.dtype))
        sums = work.view(*q.shape[:-1], -1, group).sum(-1)  # [..., M, groups]
        parts = []
        for block in unit_blocks(codes, D):
            scales = block["scales"].to(work.dtype).mT[..., None, :]  # [..., groups, 1, N]
            planes = [plane.to(work.dtype) for plane in unpack_planes(block["codes"], self.bits)]
            products = sums @ block["minima"].to(work.dtype).mT  # [..., M, N]
            for run in runs(D, group, D * self.bits // 8):
                bare = work[..., run.channels] @ planes[run.plane][..., run.within].mT
                products = products.addcmul(bare, scales[..., run.group, :, :])
            parts.append(products)
        return joined(parts).to(q.dtype)

    def mix(self, probs: Tensor, codes: Codes, dim: int) -> Tensor:
        """Weights are scaled per quant group, then applied to the bare codes."""
        group = self._group(dim)
        work = working_dtype(probs.dtype)
        parts = []
        for weights, block in weighted_blocks(probs.to(work), codes, dim):
            scales = block["scales"].mT.contiguous().to(work)  # [..., groups, N]
            scaled = weights[..., None, :, :] * scales[..., None, :]  # [..., groups, M, N]
            planes = [plane.to(work) for plane in unpack_planes(block["codes"], self.bits)]
            shift = weights @ block["minima"].to(work)  # [..., M, groups]
            bare = [
                scaled[..., run.group, :, :] @ planes[run.plane][..., run.within] + shift[..., run.group, None]
                for run in runs(dim, group, dim * self.bits // 8)
            ]
            parts.append(joined(bare))
        return reduce(torch.add, parts).to(probs.dtype)


@dataclass(frozen=True, kw_only=True)
class PerChannel(Codec):
    """A quant group is `group_slots` neighbouring slots of one channel, which are encoded as one unit.

    Stored per unit: codes uint8 [group_slots * bits / 8 * D], rows of D channels, packed by planes along the slots;
    scales and minima float16 [D].

    Args:
        bits: Bits of a code: 2, 4 or 8.
        group_slots: Slots on one scale, a multiple of 4.
        residual: The most recent tokens that are kept as they are.
    """

    name: ClassVar[str] = "per-channel"
    bits: int
    group_slots: int
    residual: int = 0

    @property
    def group_tokens(self) -> int:
        return self.group_slots

    @property
    def residual_tokens(self) -> int:
        return self.residual

    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        return {
            "codes": Field(dim * self.group_slots * self.bits // 8, torch.uint8),
            "scales": Field(dim, SCALE_DTYPE, is_scale=True),
            "minima": Field(dim, SCALE_DTYPE, is_scale=True),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        units = x.unflatten(-2, (x.shape[-2] // self.group_slots, self.group_slots))  # [..., U, g, D]
        codes, scales, minima = quantize(units, self.bits, dim=-2)
        return {
            "codes": pack(codes, self.bits, dim=-2).flatten(-2),
            "scales": scales.squeeze(-2),
            "minima": minima.squeeze(-2),
        }

    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        work = working_dtype(dtype)
        units = self._bare(codes["codes"], dim, work)
        units = units * codes["scales"].to(work)[..., None, :] + codes["minima"].to(work)[..., None, :]
        return units.flatten(-3, -2).to(dtype)

    def dot(self, q: Tensor, codes: Codes) -> Tensor:
        """Queries are scaled per unit, then multiplied with the bare codes."""
        D = q.shape[-1]
        work = q.to(working_dtype(q.dtype))
        parts = []
        for block in unit_blocks(codes, D * self.group_slots):
            if q.shape[-2] > FOLD_ROWS:
                parts.append(work @ self.decode(block, D, work.dtype).mT)
                continue
            scaled = work[..., None, :, :] * block["scales"].to(work.dtype)[..., None, :]  # [..., U, M, D]
            shift = work @ block["minima"].to(work.dtype).mT  # [..., M, U]
            products = scaled @ self._bare(block["codes"], D, work.dtype).mT  # [..., U, M, g]
            parts.append((products.transpose(-3, -2) + shift[..., None]).flatten(-2))
        return joined(parts).to(q.dtype)

    def mix(self, probs: Tensor, codes: Codes, dim: int) -> Tensor:
        """Sums of bare codes per unit, scaled and shifted before the units are added."""
        work = working_dtype(probs.dtype)
        parts = []
        for weights, block in weighted_blocks(probs.to(work), codes, dim * self.group_slots, self.group_slots):
            units = block["codes"].shape[-2]
            grouped = weights.unflatten(-1, (units, self.group_slots)).transpose(-3, -2)  # [..., U, M, g]
            bare = grouped @ self._bare(block["codes"], dim, work)  # [..., U, M, D]
            scaled = (bare * block["scales"].to(work)[..., None, :]).sum(-3)  # [..., M, D]
            parts.append(scaled + grouped.sum(-1).mT @ block["minima"].to(work))
        return reduce(torch.add, parts).to(probs.dtype)

    def _bare(self, packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """The codes themselves as [..., U, g, dim] of `dtype`."""
        return unpack(packed.unflatten(-1, (-1, dim)), self.bits, dim=-2).to(dtype)
