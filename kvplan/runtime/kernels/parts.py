"""Part: slots that queries may look at, as a layer stores them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvplan.methods.codecs import Codec, Codes


@dataclass(frozen=True)
class Stored:
    """Vectors [b, H, S, dim] as a codec holds them."""

    codec: Codec
    codes: Codes
    dim: int

    @cached_property
    def dense(self) -> Tensor | None:
        """The vectors themselves, where they are stored as they are."""
        return self.codes.get("x")

    def decoded(self, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(self.codes, self.dim, dtype)


@dataclass(frozen=True)
class Part:
    """Slots that queries may look at.

    Attributes:
        slots: S, the slots laid out.
        mask: [b, H or 1, T or 1, S] bool, True is visible; None: all.
        bias: [b, H, S] added to the logits of every query; None: 0.
        channels: [b, H, C] int64 channels of the query that the keys hold; None: all.
    """

    keys: Stored
    values: Stored
    slots: int
    mask: Tensor | None = None
    bias: Tensor | None = None
    channels: Tensor | None = None

    @cached_property
    def plain(self) -> bool:
        return self.keys.dense is not None and self.values.dense is not None and self.bias is None

    @cached_property
    def bare(self) -> bool:
        """Plain, and all of it visible."""
        return self.plain and self.mask is None and self.channels is None

    @cached_property
    def by_head(self) -> tuple[Tensor, Tensor]:
        """Of dense slots, views: keys [b * H, D, S] and values [b * H, S, Dv]."""
        keys, values = self.keys.dense, self.values.dense
        assert keys is not None and values is not None
        return keys.view(-1, *keys.shape[2:]).mT, values.view(-1, *values.shape[2:])
