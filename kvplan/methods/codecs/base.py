"""Codec: how keys or values are stored in a slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplan.registry import Registry

Codes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Field:
    """One stored tensor of a codec.

    Attributes:
        width: Elements per unit (a slot, or a group of slots) and KV head.
        dtype: What they are stored as.
        is_scale: Counted as scales (zero points, norms and offsets too), not as codes.
    """

    width: int
    dtype: torch.dtype
    is_scale: bool = False


class Codec(ABC):
    """Stores vectors of `dim` channels in fewer bytes.

    `encode` and `decode` are inverse up to rounding; `dot` and `mix` are what attention needs of encoded slots, without
    a decoded copy of them all.
    """

    name: ClassVar[str]

    @property
    def group_tokens(self) -> int:
        """Slots that are encoded as one unit; 1 when each slot stands alone and can be overwritten alone."""
        return 1

    @property
    def residual_tokens(self) -> int:
        """The most recent tokens that are kept as they are; 0 for none."""
        return 0

    def for_keys(self) -> Codec:
        """The codec that a layer uses for keys when this one is named."""
        return self

    def for_values(self) -> Codec:
        """The codec that a layer uses for values when this one is named."""
        return self

    @abstractmethod
    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        """What is stored per unit and KV head, for vectors of `dim` channels of `dtype`.

        Raises:
            MethodError: this codec cannot store vectors of that many channels.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode [..., N, D] with N a multiple of `group_tokens`: each field [..., N / group_tokens, width]."""

    @abstractmethod
    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        """What was stored, as [..., N, dim] of `dtype`."""

    def dot(self, q: Tensor, codes: Codes) -> Tensor:
        """Products of queries [..., M, D] with the stored vectors: [..., M, N], in the dtype of `q`."""
        return q @ self.decode(codes, q.shape[-1], q.dtype).mT

    def mix(self, probs: Tensor, codes: Codes, dim: int) -> Tensor:
        """Weighted sums [..., M, dim] of the stored vectors under weights [..., M, N], in the dtype of `probs`."""
        return probs @ self.decode(codes, dim, probs.dtype)

    def unit_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of one unit of one KV head, scales included."""
        return sum(f.width * f.dtype.itemsize for f in self.fields(dim, dtype).values())


codecs: Registry[Codec] = Registry("codec")
