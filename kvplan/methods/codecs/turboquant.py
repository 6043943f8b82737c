"""TurboQuant: a norm and, after a random rotation, 2 to 4 bits per coordinate."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.codecs.base import Codec, Codes, Field, codecs
from kvplan.methods.codecs.packing import joined, unit_blocks, weighted_blocks, working_dtype
from kvplan.methods.params import Choice, tunable

# Lloyd-Max levels of a standard normal variable, the positive half
LEVELS = {
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
# Vectors of up to 512 whole numbers below 2^20, times entries below 2^24.5, add up to less than 2^53: exact in float64
FINENESS = 2.0**20
ENTRY = 2.0**24
LOW_BITS = {2: 2, 3: 2, 4: 4}  # so that codes fill bytes; the third bits of eight codes fill another byte


@codecs.register("turboquant")
@dataclass(frozen=True, kw_only=True)
class TurboQuant(Codec):
    """Rotate each vector so that its coordinates look Gaussian, and round them to the best levels for a Gaussian.

    Zandieh et al. 2025, arXiv:2504.19874, the variant for mean squared error; the one with a correction bit for inner
    products is not here. The rotation is the same for all layers and heads: signs, then a Walsh-Hadamard transform (the
    authors draw a random orthogonal matrix). Channels beyond a power of two are mixed by a Hartley transform. No
    calibration, no groups: every slot stands alone. The error is 34 % of what is stored at 2 bits, 18 % at 3 and 10 %
    at 4, whatever the outliers.

    Args:
        bits: Bits of a coordinate: 2, 3 or 4.

    Raises:
        MethodError: `bits` is another number, or the codes of a vector do not fill whole bytes.
    """

    bits: int = tunable(4, Choice(2, 3, 4))

    def __post_init__(self) -> None:
        if self.bits not in LEVELS:
            raise MethodError(f"turboquant.bits is {self.bits}; it must be 2, 3 or 4")

    @property
    def low_bits(self) -> int:
        """Bits of a code in "codes"; a third bit is in "tops"."""
        return LOW_BITS[self.bits]

    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        multiple = {2: 4, 3: 8, 4: 2}[self.bits]
        if dim % multiple:
            raise MethodError(
                f"turboquant.bits is {self.bits}, and codes of {dim} channels do not fill whole bytes; "
                f"the channels must be a multiple of {multiple}"
            )
        tops = {"tops": Field(dim // 8, torch.uint8)} if self.bits == 3 else {}
        return {
            "codes": Field(dim * self.low_bits // 8, torch.uint8),
            **tops,
            "norms": Field(1, torch.float16, is_scale=True),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Rotates whole numbers in float64, where sums are exact: what becomes of a vector must not depend on how many
        are encoded with it, and the order of a matrix product's sums does."""
        x = x.to(working_dtype(x.dtype))
        largest = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        whole = (x / largest * FINENESS).round().double()
        norms = (whole * whole).sum(-1, keepdim=True).sqrt()
        turned = whole @ integer_rotation(x.shape[-1], x.device) / (norms.clamp_min(1) * ENTRY)
        codes = torch.bucketize(turned, thresholds(self.bits, x.device), out_int32=True).to(torch.uint8)
        tops = {"tops": pack_neighbours(codes >> 2, 1)} if self.bits == 3 else {}
        low = pack_neighbours(codes & 2**self.low_bits - 1, self.low_bits)
        norms = (norms * largest / FINENESS).clamp_max(65504)
        return {"codes": low, **tops, "norms": norms.to(torch.float16)}

    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        work = working_dtype(dtype)
        rotated = self._bare(codes, dim, work) * self._factors(codes["norms"], dim, work)
        return (rotated @ rotation(dim, work, rotated.device)).to(dtype)

    def dot(self, q: Tensor, codes: Codes) -> Tensor:
        """The query is rotated, not the stored vectors."""
        D = q.shape[-1]
        work = working_dtype(q.dtype)
        rotated = q.to(work) @ rotation(D, work, q.device).mT
        bare = [rotated @ self._bare(block, D, work).mT for block in unit_blocks(codes, D)]
        return (joined(bare) * self._factors(codes["norms"], D, work).mT).to(q.dtype)

    def mix(self, probs: Tensor, codes: Codes, dim: int) -> Tensor:
        """Sums are taken in the rotated space, and rotated back once."""
        work = working_dtype(probs.dtype)
        weights = probs.to(work) * self._factors(codes["norms"], dim, work).mT
        parts = [part @ self._bare(block, dim, work) for part, block in weighted_blocks(weights, codes, dim)]
        return (reduce(torch.add, parts) @ rotation(dim, work, probs.device)).to(probs.dtype)

    def _bare(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        """The levels of the stored codes, [..., N, dim]: rotated, and as if each vector had norm sqrt(dim)."""
        words = codes["codes"].to(torch.int32)
        if self.bits == 3:
            tops = top_table(words.device).index_select(0, codes["tops"].to(torch.int32).flatten())
            words = words | tops.view(torch.int32).view(words.shape)
        levels = level_table(self.bits, words.device).index_select(0, words.flatten())
        return levels.view(torch.float32).view(*words.shape[:-1], dim).to(dtype)

    def _factors(self, norms: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return norms.to(dtype) * dim**-0.5


def level_values(bits: int) -> tuple[float, ...]:
    """The 2**bits levels in rising order: code -> value."""
    return (*(-level for level in reversed(LEVELS[bits])), *LEVELS[bits])


@lru_cache
def thresholds(bits: int, device: torch.device) -> Tensor:
    """Midpoints between the levels, float64."""
    with torch.inference_mode(False):
        middle = [(a + b) / 2 for a, b in itertools.pairwise(level_values(bits))]
        return torch.tensor(middle, dtype=torch.float64, device=device)


def pack_neighbours(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] below 2**bits -> bytes [..., D * bits / 8] of neighbours, the first in the lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits)).unbind(-1)
    return reduce(torch.bitwise_or, [part << bits * j for j, part in enumerate(parts)])


@lru_cache
def level_table(bits: int, device: torch.device) -> Tensor:
    """The float32 levels of each word, all of a word in one wide element: one lookup decodes two or four codes.

    A word is a byte of codes; at 3 bits it has the four top bits above. complex128 stands for four float32 and float64
    for two; nothing is ever computed with them.
    """
    low_bits = LOW_BITS[bits]
    places = range(8 // low_bits)
    with torch.inference_mode(False):
        words = torch.arange(2 ** (bits * len(places)))
        codes = torch.stack([words >> low_bits * j & 2**low_bits - 1 for j in places], -1)
        if bits > low_bits:
            codes = codes | torch.stack([(words >> 8 + j & 1) << low_bits for j in places], -1)
        levels = torch.tensor(level_values(bits), dtype=torch.float32)[codes]
        return levels.view(torch.complex128 if len(places) == 4 else torch.float64).squeeze(-1).to(device)


@lru_cache
def top_table(device: torch.device) -> Tensor:
    """A byte of eight top bits as two int32 words with four of them in bits 8 to 11, in one int64 element."""
    with torch.inference_mode(False):
        tops = torch.arange(256, dtype=torch.int32)
        return torch.stack([(tops & 15) << 8, tops >> 4 << 8], -1).view(torch.int64).squeeze(-1).to(device)


def sign(index: int) -> int:
    """A fixed random sign per channel, from integer arithmetic alone: the same on every machine.

    The mixing steps of splitmix64 (Steele, Lea and Flood 2014).
    """
    mask = 2**64 - 1
    z = (index + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return 1 if (z ^ z >> 31) >> 63 else -1


@lru_cache
def integer_rotation(dim: int, device: torch.device) -> Tensor:
    """The rotation times sqrt(dim) * ENTRY, for vectors on its left: [dim, dim] whole numbers in float64.

    Signs of the channels, then a Walsh-Hadamard transform over the largest power of two in `dim` and a Hartley
    transform over the odd rest.
    """
    power = dim & -dim
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < power:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        steps = torch.arange(dim // power, dtype=torch.float64)
        angles = 2 * math.pi / (dim // power) * torch.outer(steps, steps)
        matrix = torch.kron(((angles.cos() + angles.sin()) * ENTRY).round(), matrix)
        signs = torch.tensor([sign(i) for i in range(dim)], dtype=torch.float64)
        return (signs[:, None] * matrix).to(device)


@lru_cache
def rotation(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rotation as a matrix [dim, dim]: `matrix @ vector` is what is stored, and `matrix.T` turns back."""
    with torch.inference_mode(False):
        return (integer_rotation(dim, device).mT / (math.sqrt(dim) * ENTRY)).to(dtype).contiguous()
