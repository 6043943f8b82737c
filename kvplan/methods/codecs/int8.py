"""int8: one byte per channel, one scale and minimum per vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.codecs.base import Codec, Codes, Field, codecs
from kvplan.methods.codecs.grouped import PerToken
from kvplan.methods.params import Choice, tunable


@codecs.register("int8")
@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    """Round each vector to 256 evenly spaced levels between its smallest and its largest channel.

    The usual per-token asymmetric quantization, e.g. of ZeroQuant, Yao et al. 2022, arXiv:2206.01861, at one vector per
    KV head. Asymmetric, because it never has the larger step, decodes a constant vector to itself, and costs only
    2 bytes more per vector than a symmetric one. The error is about 0.5 % of what is stored, and every slot stands
    alone, so this is the first codec to try with any evictor.

    Args:
        group_channels: Neighbouring channels on one scale and minimum (2 bytes each). None: the whole vector.

    Raises:
        MethodError: `group_channels` is below 2, or does not divide the vector.
    """

    group_channels: int | None = tunable(None, Choice(None, 32, 64))

    def __post_init__(self) -> None:
        if self.group_channels is not None and self.group_channels < 2:
            raise MethodError(f"int8.group_channels is {self.group_channels}; it must be at least 2, or null")

    @property
    def _grouped(self) -> PerToken:
        return PerToken(bits=8, group_channels=self.group_channels, setting="int8.group_channels")

    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        return self._grouped.fields(dim, dtype)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return self._grouped.encode(x)

    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        return self._grouped.decode(codes, dim, dtype)

    def dot(self, q: Tensor, codes: Codes) -> Tensor:
        return self._grouped.dot(q, codes)

    def mix(self, probs: Tensor, codes: Codes, dim: int) -> Tensor:
        return self._grouped.mix(probs, codes, dim)
