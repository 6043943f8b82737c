"""Dense: slots as the model made them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplan.methods.codecs.base import Codec, Codes, Field, codecs


@codecs.register("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Codec):
    """No encoding: the dtype of the model."""

    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        return {"x": Field(dim, dtype)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}

    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        return codes["x"].to(dtype)
