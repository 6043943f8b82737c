"""Encoded slots in flat buffers, and what a fused kernel must know to read them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from kvplan.methods.codecs import Codec, Codes
from kvplan.methods.codecs.dense import Dense
from kvplan.methods.codecs.fp8 import FP8
from kvplan.methods.codecs.grouped import PerChannel, PerToken
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.turboquant import TurboQuant, level_values, rotation


@dataclass(frozen=True)
class Encoded:
    """Vectors of `dim` channels as a codec holds them: each field [units of the buffer, width]."""

    codec: Codec
    codes: Codes
    dim: int

    @property
    def unit_slots(self) -> int:
        return self.codec.group_tokens


class Form(IntEnum):
    """How an element is found in the bytes, and what makes it a number again."""

    DENSE = 0
    PER_TOKEN = 1  # planes along the channels; scale and minimum per group of channels
    PER_CHANNEL = 2  # planes along the slots of a unit; scale and minimum per channel of the unit
    # From here on one scale per slot, which is applied to products and weights instead of to every channel.
    VECTOR = 3  # planes along the channels, and a minimum
    LEVELS = 4  # neighbouring codes in a byte (at 3 bits the third is in bytes of its own), and a table of levels
    FLOAT8 = 5  # 8-bit floats


@dataclass(frozen=True)
class Layout:
    """What a fused kernel is compiled for and handed.

    Attributes:
        bits: Bits of a code; of the exponent, for FLOAT8.
        group: Channels (PER_TOKEN) or slots (PER_CHANNEL) on one scale; else 1.
        codes: [units, width] uint8, or the vectors themselves.
        scales: [units, ...] float16; absent for DENSE.
        extras: Minima (like `scales`), or levels [2**bits] float32; absent for DENSE and FLOAT8.
        tops: [units, dim / 8] uint8 third bits of LEVELS with 3 bits; else absent.
        factor: On every scale.
        rotation: [dim, dim] float32 orthogonal matrix: what is stored is `rotation @ vector`. None: the vector itself.
    """

    form: Form
    bits: int
    group: int
    codes: Tensor
    scales: Tensor | None = None
    extras: Tensor | None = None
    tops: Tensor | None = None
    factor: float = 1.0
    rotation: Tensor | None = None


def layout_of(encoded: Encoded) -> Layout | None:
    """The layout that fused kernels read, or None for codecs and parameters that they do not know."""
    codec, codes, dim = encoded.codec, encoded.codes, encoded.dim
    if isinstance(codec, Dense):
        return Layout(Form.DENSE, 8, 1, codes["x"])
    if isinstance(codec, Int8 | PerToken):
        bits = codec.bits if isinstance(codec, PerToken) else 8
        group = dim if codec.group_channels is None else min(codec.group_channels, dim)
        if group != dim and not _power_of_two(group):
            return None
        form = Form.VECTOR if group == dim else Form.PER_TOKEN
        return Layout(form, bits, group, codes["codes"], codes["scales"], codes["minima"])
    if isinstance(codec, PerChannel):
        if not _power_of_two(codec.group_slots):
            return None
        return Layout(Form.PER_CHANNEL, codec.bits, codec.group_slots, codes["codes"], codes["scales"], codes["minima"])
    if isinstance(codec, TurboQuant):
        levels = _levels(codec.bits, codes["codes"].device)
        turn = rotation(dim, torch.float32, codes["codes"].device)
        tops = codes.get("tops")
        return Layout(Form.LEVELS, codec.bits, 1, codes["codes"], codes["norms"], levels, tops, dim**-0.5, turn)
    if isinstance(codec, FP8):
        exponent = 4 if codec.kind == "e4m3" else 5
        # As float16 numbers of the same bits, e4m3 is 2^8 too small; e5m2 is scaled to its own largest number.
        factor = 2.0**8 if exponent == 4 else 448.0 / 57344.0
        return Layout(Form.FLOAT8, exponent, 1, codes["codes"], codes["scales"], factor=factor)
    return None


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


@lru_cache(maxsize=16)
def _levels(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(level_values(bits), dtype=torch.float32, device=device)
