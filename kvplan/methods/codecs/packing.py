"""Small integers in bytes, by planes.

A run of codes is cut into 8 / bits planes of equal length; plane j is `(byte >> bits * j) & mask`. A plane is then one
shift and one mask over whole bytes, which is several times faster on a CPU than spreading each byte over its codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvplan.methods.codecs.base import Codes

Blocks = list[tuple[Tensor, Codes]]

BLOCK_ELEMENTS = 2**20  # codes that are floats at one time: 4 MiB of float32


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack uint8 codes below 2**bits along `dim` (negative), whose length is a multiple of 8 / bits."""
    count = 8 // bits
    planes = codes.unflatten(dim, (count, -1)).unbind(dim - 1)
    packed = planes[0]
    for j in range(1, count):
        packed = packed | (planes[j] << bits * j)
    return packed


def unpack_planes(packed: Tensor, bits: int) -> list[Tensor]:
    """The planes of packed bytes, each uint8 and of the bytes' shape."""
    count = 8 // bits
    planes = [packed >> bits * j if j else packed for j in range(count)]
    return [plane & 2**bits - 1 for plane in planes[:-1]] + planes[-1:]


def unpack(packed: Tensor, bits: int, dim: int = -1) -> Tensor:
    """The inverse of `pack`."""
    planes = unpack_planes(packed, bits)
    return planes[0] if len(planes) == 1 else torch.stack(planes, dim - 1).flatten(dim - 1, dim)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What codecs compute in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_blocks(codes: Codes, elements_per_unit: int) -> list[Codes]:
    """Cut stored fields [..., U, width] into blocks of units, of about BLOCK_ELEMENTS decoded elements each.

    There is always a block; without units it is empty.
    """
    stored = codes["codes"]
    units = stored.shape[-2]
    step = max(1, BLOCK_ELEMENTS // max(1, stored.shape[:-2].numel() * elements_per_unit))
    if units <= step:
        return [codes]
    return [
        {name: field[..., start : start + step, :] for name, field in codes.items()} for start in range(0, units, step)
    ]


def weighted_blocks(weights: Tensor, codes: Codes, elements_per_unit: int, slots_per_unit: int = 1) -> Blocks:
    """`unit_blocks`, each with its part of the weights [..., M, N]."""
    blocks = unit_blocks(codes, elements_per_unit)
    if len(blocks) == 1:
        return [(weights, codes)]
    sizes = [block["codes"].shape[-2] * slots_per_unit for block in blocks]
    return list(zip(weights.split(sizes, -1), blocks, strict=True))


def joined(parts: list[Tensor]) -> Tensor:
    """Blocks one after the other along the last dimension."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
