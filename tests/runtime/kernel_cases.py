"""Cases for the kernels, and how far a kernel is from the reference.

As a script, with KVPLAN_KERNELS=triton: run the Triton kernels over all cases, print one JSON object, case -> largest
error. Under TRITON_INTERPRET=1 that needs no GPU; with `cuda` as argument it runs on one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from kvplan.methods.codecs import Codec, codecs
from kvplan.methods.codecs.dense import Dense
from kvplan.runtime.kernels import choose, reference
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.encoded import Encoded
from kvplan.runtime.kernels.varlen import DecodeArgs, Decoded, Probs, Sequences

# Allocated and held slots: a full sequence, part of one, one slot, none; with more than one chunk in the longest.
SIZES, HELD = (300, 150, 7, 40), (300, 131, 1, 0)


@dataclass(frozen=True)
class DecodeCase:
    """One decode step over a dense pool."""

    group: int
    dim: int
    dtype: torch.dtype = torch.float32
    value_dim: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    probs: Probs = Probs.NONE
    held: tuple[int, ...] = HELD
    sizes: tuple[int, ...] = SIZES

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Sequences, DecodeArgs]:
        generator = torch.Generator().manual_seed(self.group * 1000 + self.dim)

        def random(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        N, slots = len(self.sizes), sum(self.sizes)
        args = DecodeArgs(
            scaling=self.dim**-0.5,
            softcap=self.softcap,
            sink_logits=random(N, self.group, dtype=torch.float32) if self.sinks else None,
            bias=random(slots, dtype=torch.float32) if self.bias else None,
            probs=self.probs,
        )
        keys, values = random(slots, self.dim), random(slots, self.value_dim or self.dim)
        seqs = Sequences.of(self.sizes, self.held, device)
        return random(N, self.group, self.dim), keys, values, seqs, args


DECODE_CASES = {
    "one query": DecodeCase(1, 64),
    "two queries, probabilities by head": DecodeCase(2, 80, probs=Probs.HEADS),
    "four queries, mean probabilities": DecodeCase(4, 128, probs=Probs.MEAN),
    "eight queries, float16": DecodeCase(8, 128, torch.float16),
    "three queries": DecodeCase(3, 64),
    "softcap": DecodeCase(2, 64, softcap=3.0),
    "sinks": DecodeCase(2, 64, sinks=True, probs=Probs.HEADS),
    "bias": DecodeCase(2, 64, bias=True),
    "all at once, float16": DecodeCase(2, 80, torch.float16, softcap=3.0, sinks=True, bias=True, probs=Probs.MEAN),
    "pruned keys": DecodeCase(2, 40, value_dim=64),
    "one chunk": DecodeCase(4, 64, sizes=(20, 20), held=(20, 3), sinks=True),
    "even": DecodeCase(4, 64, sizes=(256, 256), held=(256, 130)),
}

# The interpreter multiplies the bits of bfloat16 matrices as if they were integers.
GPU_CASES = {"bfloat16": DecodeCase(4, 128, torch.bfloat16), "bfloat16, wide": DecodeCase(8, 256, torch.bfloat16)}


@dataclass(frozen=True)
class QuantizedCase:
    """One decode step over encoded slots."""

    keys: Codec
    values: Codec
    dim: int = 64
    dtype: torch.dtype = torch.float32
    probs: Probs = Probs.NONE
    sizes: tuple[int, ...] = field(default=(256, 192, 64, 128))
    held: tuple[int, ...] = field(default=(256, 131, 1, 0))

    def make(self, device: str = "cpu") -> tuple[Tensor, Encoded, Encoded, Sequences, DecodeArgs]:
        plain = DecodeCase(2, self.dim, self.dtype, probs=self.probs, sizes=self.sizes, held=self.held)
        q, keys, values, seqs, args = plain.make(device)
        return q, _encoded(self.keys, keys), _encoded(self.values, values), seqs, args


def _encoded(codec: Codec, x: Tensor) -> Encoded:
    return Encoded(codec, {name: t.contiguous() for name, t in codec.encode(x).items()}, x.shape[-1])


def _kivi(bits: int, group: int) -> dict[str, Codec]:
    codec = codecs["kivi"](bits=bits, group=group, residual_tokens=group)
    return {"keys": codec.for_keys(), "values": codec.for_values()}


def _both(name: str, **settings: Any) -> dict[str, Codec]:
    return {"keys": codecs[name](**settings), "values": codecs[name](**settings)}


QUANTIZED_CASES = {
    "kivi, 2 bits": QuantizedCase(**_kivi(2, 32), probs=Probs.HEADS),
    "kivi, 4 bits": QuantizedCase(**_kivi(4, 32), dim=128),
    "kivi, a group of a whole vector": QuantizedCase(**_kivi(4, 64)),
    "kivi, float16": QuantizedCase(**_kivi(2, 32), dtype=torch.float16),
    "int8": QuantizedCase(**_both("int8"), dim=80),
    "int8, groups": QuantizedCase(**_both("int8", group_channels=32)),
    "kivi keys, dense values": QuantizedCase(_kivi(2, 32)["keys"], Dense()),
    "dense keys, int8 values": QuantizedCase(Dense(), codecs["int8"]()),
    "turboquant, 2 bits": QuantizedCase(**_both("turboquant", bits=2)),
    "turboquant, 3 bits": QuantizedCase(**_both("turboquant", bits=3), dim=80),
    "turboquant, 4 bits": QuantizedCase(**_both("turboquant", bits=4)),
    "fp8": QuantizedCase(codecs["fp8"](kind="e4m3"), codecs["fp8"](kind="e5m2")),
}


@dataclass(frozen=True)
class ColumnsCase:
    """A prompt, or the last part of one, with padding on the left."""

    heads: int
    group: int
    dim: int
    num_queries: int
    num_keys: int
    padding: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    sinks: bool = False

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, AttentionArgs]:
        generator = torch.Generator().manual_seed(self.num_keys)

        def random(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        B, Hq = len(self.padding), self.heads * self.group
        sinks = random(Hq, dtype=torch.float32) if self.sinks else None
        args = AttentionArgs(self.dim**-0.5, self.softcap, sinks)
        valid = torch.arange(self.num_keys) >= torch.tensor(self.padding)[:, None]
        q = random(B, Hq, self.num_queries, self.dim)
        return q, random(B, self.heads, self.num_keys, self.dim), valid.to(device), args


COLUMNS_CASES = {
    "padding": ColumnsCase(2, 2, 64, 70, 70, (0, 37)),
    "softcap and sinks": ColumnsCase(1, 2, 80, 41, 41, (3, 40), softcap=3.0, sinks=True),
    "the last queries": ColumnsCase(2, 1, 64, 20, 90, (0, 5)),
    "float16": ColumnsCase(1, 4, 128, 50, 50, (0,), torch.float16),
}


def decode_error(case: DecodeCase, decoded: Decoded) -> float:
    return error(decoded, reference.decode(*case.make()))


def quantized_error(case: QuantizedCase, decoded: Decoded) -> float:
    return error(decoded, reference.quantized_decode(*case.make()))


def columns_error(case: ColumnsCase, sums: Tensor) -> float:
    largest = float((sums.double().cpu() - reference.column_sums(*case.make())).abs().max())
    return largest if largest == largest else float("inf")


def error(decoded: Decoded, expected: Decoded) -> float:
    """The largest difference in output, log-sum-exp and probabilities; infinite where one is not a number."""
    pairs = [(decoded.out, expected.out)]
    if decoded.lse is not None:
        assert expected.lse is not None
        # exp: a sequence that holds nothing has the log-sum-exp -inf
        pairs.append((decoded.lse.double().exp().log1p(), expected.lse.exp().log1p()))
    assert (decoded.probs is None) == (expected.probs is None)
    if decoded.probs is not None and expected.probs is not None:
        pairs.append((decoded.probs, expected.probs))
    largest = max(float((a.double().cpu() - b.double().cpu()).abs().max()) for a, b in pairs)
    return largest if largest == largest else float("inf")


def errors(device: str) -> Iterator[tuple[str, float]]:
    """By way of the chooser: KVPLAN_KERNELS says which kernels these are."""
    decode_cases = DECODE_CASES if device == "cpu" else {**DECODE_CASES, **GPU_CASES}
    for name, decode_case in decode_cases.items():
        yield f"decode: {name}", decode_error(decode_case, choose.decode(*decode_case.make(device)))
    for name, quantized_case in QUANTIZED_CASES.items():
        yield (
            f"quantized: {name}",
            quantized_error(quantized_case, choose.quantized_decode(*quantized_case.make(device))),
        )
    for name, columns_case in COLUMNS_CASES.items():
        yield f"columns: {name}", columns_error(columns_case, choose.column_sums(*columns_case.make(device)))


def main(device: str) -> None:
    assert "triton" not in sys.modules and "flash_attn" not in sys.modules, "imported before they were needed"
    torch.use_deterministic_algorithms(True)  # new buffers are filled with NaN: what is not written shows
    found = dict(errors(device))
    assert "kvplan.runtime.kernels.triton_decode" in sys.modules, "these were not the Triton kernels"
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
