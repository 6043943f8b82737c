"""KIVI: keys grouped along tokens, values along channels, 2 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.codecs.base import Codec, Codes, Field, codecs
from kvplan.methods.codecs.grouped import PerChannel, PerToken
from kvplan.methods.params import Choice, tunable


@codecs.register("kivi")
@dataclass(frozen=True, kw_only=True)
class KIVI(Codec):
    """Keys have outlier channels, so each channel of `group` tokens has its own scale; values are scaled per token.

    Liu et al. 2024, arXiv:2402.02750. The most recent tokens stay as they are. Scales and minima are float16 whatever
    the model's dtype (the authors: the model's), a constant group decodes to itself (theirs: NaN), and codes are packed
    by planes instead of in words of 32 bits. The authors recommend 4 bits for models with grouped-query attention.
    Keys are stored in units of `group` slots: a slot inside a unit cannot be dropped or overwritten alone.

    Args:
        bits: Bits of a code, 2 or 4.
        group: Elements on one scale: tokens of a channel (keys), channels of a token (values; a vector with fewer
            channels is one group).
        residual_tokens: The most recent tokens that are kept as they are; a multiple of `group`.

    Raises:
        MethodError: a parameter is out of range, or `group` divides neither `residual_tokens` nor the values' channels.
    """

    bits: int = tunable(4, Choice(2, 4))
    group: int = tunable(32, Choice(32, 64, 128))
    residual_tokens: int = tunable(128, Choice(32, 64, 128))

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise MethodError(f"kivi.bits is {self.bits}; it must be 2 or 4")
        if self.group < 4 or self.group % 4:
            raise MethodError(f"kivi.group is {self.group}; it must be a multiple of 4")
        if self.residual_tokens < self.group or self.residual_tokens % self.group:
            raise MethodError(
                f"kivi.residual_tokens is {self.residual_tokens}; it must be a multiple of kivi.group ({self.group})"
            )

    @property
    def group_tokens(self) -> int:
        self._no_role()

    def for_keys(self) -> PerChannel:
        return PerChannel(bits=self.bits, group_slots=self.group, residual=self.residual_tokens)

    def for_values(self) -> PerToken:
        return PerToken(bits=self.bits, group_channels=self.group, residual=self.residual_tokens, setting="kivi.group")

    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        self._no_role()

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        self._no_role()

    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        self._no_role()

    def _no_role(self) -> NoReturn:
        raise NotImplementedError("kivi stores keys and values differently: ask for_keys() or for_values()")
