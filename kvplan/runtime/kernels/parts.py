"""Part: slots that queries may look at, as a layer stores them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplan.methods.codecs import Codec, Codes


@dataclass(frozen=True)
class Stored:
    """Vectors [b, H, S, dim] as a codec holds them."""

    codec: Codec
    codes: Codes
    dim: int

    @property
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

    @property
    def plain(self) -> bool:
        return self.keys.dense is not None and self.values.dense is not None and self.bias is None
