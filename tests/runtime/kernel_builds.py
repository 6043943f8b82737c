"""Compile the Triton kernels for a GPU that need not be there; print a JSON object, kernel -> bytes spilled per thread.

Triton's own assembler does the work. What the interpreter does not check, tile sizes and types of matrix products
first of all, is an error here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvplan.runtime.kernels import triton_columns, triton_decode, triton_quantized
from kvplan.runtime.kernels.encoded import Form

TARGET = GPUTarget("cuda", 90, 32)  # H100, H200
NUMBERS = {"scaling": "fp32", "softcap": "fp32", "key_factor": "fp32", "value_factor": "fp32"}
COUNTS = ("longest", "chunk", "num_queries", "num_keys", "parts")
POINTERS = {"starts": "*i64", "held": "*i32", "valid": "*u8", "q": "*bf16", "keys": "*bf16", "values": "*bf16"}
FLAGS = {"SINKS": True, "CAP": True, "BIAS": True, "LOGITS": True}


def spilled_bytes(kernel: Any, constants: dict[str, Any], warps: int, stages: int, **types: str) -> int:
    """Compile; pointers that are not named are float32."""
    known = {**NUMBERS, **dict.fromkeys(COUNTS, "i32"), **POINTERS, **types}
    signature = {n: "constexpr" if n in constants else known.get(n, "*fp32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return max(int(found[1]), int(found[2]))


def decode(dim: int, dtype: str) -> int:
    tile = triton_decode.tile_for(dim, dim, 4 if dtype == "fp32" else 2)
    pad = triton_decode.padded(dim)
    shape = {
        "G": 4,
        "ROWS": 16,
        "KEY_DIM": dim,
        "VALUE_DIM": dim,
        "KEY_PAD": pad,
        "VALUE_PAD": pad,
        "SLOTS": tile.slots,
    }
    types = dict.fromkeys(("q", "keys", "values"), f"*{dtype}")
    return spilled_bytes(triton_decode._split_kernel, {**shape, **FLAGS}, tile.warps, tile.stages, **types)


def quantized(dim: int, keys: tuple[Form, int, int], values: tuple[Form, int, int]) -> int:
    tile = triton_quantized.LOOKUP_TILE if Form.LEVELS in (keys[0], values[0]) else triton_quantized.TILE
    constants = {"G": 4, "ROWS": 16, "SLOTS": tile.slots, **FLAGS}
    types = {}
    for role, (form, bits, group) in (("key", keys), ("value", values)):
        shape = {"FORM": int(form), "DIM": dim, "PAD": triton_decode.padded(dim), "BITS": bits, "GROUP": group}
        constants.update({f"{role.upper()}_{name}": value for name, value in shape.items()})
        types[f"{role}_codes"] = "*bf16" if form is Form.DENSE else "*u8"
        types[f"{role}_scales"] = "*fp16"
        types[f"{role}_extras"] = "*fp32" if form is Form.LEVELS else "*fp16"
        types[f"{role}_tops"] = "*u8"
    return spilled_bytes(triton_quantized._split_kernel, constants, tile.warps, tile.stages, **types)


def columns(kernel: Any, **more: Any) -> int:
    constants = {"HEADS": 8, "G": 4, "D": 128, "PAD": 128, "BLOCK": 128, "CAP": True, **more}
    return spilled_bytes(kernel, constants, 8, 3)


def builds() -> Iterator[tuple[str, int]]:
    yield "decode, 128 channels, bf16", decode(128, "bf16")
    yield "kivi, 2 bits", quantized(128, (Form.PER_CHANNEL, 2, 32), (Form.PER_TOKEN, 2, 32))
    yield "int8 keys, dense values", quantized(128, (Form.VECTOR, 8, 128), (Form.DENSE, 8, 1))
    yield "column sums", columns(triton_columns._sums_kernel)
    if "all" not in sys.argv:
        return
    for dtype in ("fp16", "bf16", "fp32"):
        for dim in (64, 80, 128, 256):
            yield f"decode, {dim} channels, {dtype}", decode(dim, dtype)
    for bits in (2, 3, 4):
        yield f"turboquant, {bits} bits", quantized(128, (Form.LEVELS, bits, 1), (Form.LEVELS, bits, 1))
    for dim in (80, 256):
        yield f"int8, {dim} channels", quantized(dim, (Form.VECTOR, 8, dim), (Form.VECTOR, 8, dim))
    yield "kivi, 4 bits, 256 channels", quantized(256, (Form.PER_CHANNEL, 4, 64), (Form.PER_TOKEN, 4, 64))
    yield "fp8", quantized(128, (Form.FLOAT8, 4, 1), (Form.FLOAT8, 5, 1))
    yield "log-sum-exp", columns(triton_columns._lse_kernel, SINKS=True)
    pad = {"G": 4, "D": 128, "PAD": 128, "PARTS": 64}
    yield "join", spilled_bytes(triton_decode._join_kernel, pad, 4, 3, out="*bf16")
    yield (
        "probabilities",
        spilled_bytes(triton_decode._probs_kernel, {"G": 4, "ROWS": 4, "SLOTS": 256, "MEAN": True}, 4, 3),
    )


if __name__ == "__main__":
    print(json.dumps(dict(builds())))
