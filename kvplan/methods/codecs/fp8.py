"""fp8: 8-bit floats with one scale per vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.codecs.base import Codec, Codes, Field, codecs
from kvplan.methods.codecs.packing import joined, unit_blocks, weighted_blocks, working_dtype
from kvplan.methods.params import Choice, tunable

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0


@codecs.register("fp8")
@dataclass(frozen=True, kw_only=True)
class FP8(Codec):
    """Store each channel as an 8-bit float, after scaling the vector so that its largest channel just fits.

    Formats of Micikevicius et al. 2022, arXiv:2209.05433. transformers and vLLM scale a whole tensor by one number,
    which transformers takes from the first update and freezes, so a louder later token saturates. Here each vector has
    its own float16 scale (2 bytes): slots stand alone and can be dropped or overwritten, and nothing saturates. The
    error is 2.5 % (e4m3) or 5 % (e5m2) of what is stored, more than that of `int8` at the same bytes.

    Args:
        kind: "e4m3" (3 bits of mantissa, up to 448) or "e5m2" (2 bits, up to 57344).

    Raises:
        MethodError: `kind` is neither.
    """

    kind: Literal["e4m3", "e5m2"] = tunable("e4m3", Choice("e4m3", "e5m2"))

    def __post_init__(self) -> None:
        if self.kind not in ("e4m3", "e5m2"):
            raise MethodError(f"fp8.kind is '{self.kind}'; it must be e4m3 or e5m2")

    def fields(self, dim: int, dtype: torch.dtype) -> dict[str, Field]:
        # uint8, not a float8 dtype: every torch operation can move bytes
        return {"codes": Field(dim, torch.uint8), "scales": Field(1, torch.float16, is_scale=True)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        x = x.to(working_dtype(x.dtype))
        scales = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(SMALLEST_SCALE, 65504).to(torch.float16)
        largest, target = (E4M3_MAX, torch.float8_e4m3fn) if self.kind == "e4m3" else (E5M2_MAX, torch.float8_e5m2)
        # What a cast makes of numbers above the largest depends on the build, so it never sees one
        scaled = (x / scales.to(x.dtype) * (largest / E4M3_MAX)).clamp(-largest, largest)
        return {"codes": scaled.to(torch.float32).to(target).view(torch.uint8), "scales": scales}

    def decode(self, codes: Codes, dim: int, dtype: torch.dtype) -> Tensor:
        work = working_dtype(dtype)
        return (self._bare(codes["codes"], work) * self._factors(codes["scales"], work)).to(dtype)

    def dot(self, q: Tensor, codes: Codes) -> Tensor:
        work = working_dtype(q.dtype)
        bare = [q.to(work) @ self._bare(block["codes"], work).mT for block in unit_blocks(codes, q.shape[-1])]
        return (joined(bare) * self._factors(codes["scales"], work).mT).to(q.dtype)

    def mix(self, probs: Tensor, codes: Codes, dim: int) -> Tensor:
        work = working_dtype(probs.dtype)
        weights = probs.to(work) * self._factors(codes["scales"], work).mT
        parts = [part @ self._bare(block["codes"], work) for part, block in weighted_blocks(weights, codes, dim)]
        return reduce(torch.add, parts).to(probs.dtype)

    def _bare(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The stored floats, up to the power of two that `_factors` puts back.

        Both formats are float16 with fewer bits: moved to the place of float16's sign, exponent and mantissa they are
        float16 numbers, 2^8 too small for e4m3. torch's own cast is 10 times slower on a CPU.
        """
        wide = stored.view(torch.int8).to(torch.int16)
        if self.kind == "e5m2":
            return wide.bitwise_left_shift_(8).view(torch.float16).to(dtype)
        # The sign was extended to the left: it is in bit 15 and, where the fifth exponent bit would be, in bit 14
        return wide.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16).to(dtype)

    def _factors(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return scales.to(dtype) * (2.0**8 if self.kind == "e4m3" else E4M3_MAX / E5M2_MAX)
