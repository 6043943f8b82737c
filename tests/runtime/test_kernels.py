"""Every kernel equals its reference: plain torch here, Triton in a process of its own under its interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvplan.errors import RuntimeLimitError
from kvplan.runtime.kernels import choose, portable, reference
from kvplan.runtime.kernels.varlen import DecodeArgs, Probs, Sequences, merge
from tests.runtime.kernel_cases import (
    COLUMNS_CASES,
    DECODE_CASES,
    QUANTIZED_CASES,
    ColumnsCase,
    DecodeCase,
    QuantizedCase,
    columns_error,
    decode_error,
    error,
    quantized_error,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'kvplan[gpu]' (Linux only)"
)


@pytest.fixture(autouse=True)
def _choose_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choose.SETTING, raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DECODE_CASES.values(), ids=DECODE_CASES)
def test_torch_decode_equals_the_reference(case: DecodeCase, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    for need_lse in (False, True):
        decoded = choose.decode(*case.make(), need_lse=need_lse)
        assert decode_error(case, decoded) < TOLERANCE[dtype]
        assert decoded.lse is not None or not need_lse
        assert decoded.out.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", QUANTIZED_CASES.values(), ids=QUANTIZED_CASES)
def test_torch_quantized_decode_equals_the_reference(case: QuantizedCase, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    # Codecs work in float32 where they would look up or store such numbers anyway.
    assert quantized_error(case, choose.quantized_decode(*case.make())) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("case", COLUMNS_CASES.values(), ids=COLUMNS_CASES)
def test_torch_column_sums_equal_the_reference(case: ColumnsCase, given_lse: bool, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    inputs = case.make()
    lse = portable.attention_lse(*inputs) if given_lse else None
    if lse is not None:
        assert float((lse.double() - reference.attention_lse(*inputs)).abs().max()) < TOLERANCE[dtype]
    assert columns_error(case, choose.column_sums(*inputs, lse)) < TOLERANCE[dtype] * 10  # sums of 70 rows


def test_a_columns_mass_is_the_number_of_queries() -> None:
    q, keys, valid, args = COLUMNS_CASES["padding"].make()
    sums = choose.column_sums(q, keys, valid, args)
    torch.testing.assert_close(sums.sum(-1), valid.sum(-1, keepdim=True).float().expand(-1, keys.shape[1]))


@pytest.mark.parametrize("sinks", [False, True])
def test_parts_merge_into_the_whole(sinks: bool) -> None:
    case = DecodeCase(2, 64, torch.float64, sinks=sinks, probs=Probs.HEADS, sizes=(90, 90), held=(90, 90))
    q, keys, values, seqs, args = case.make()
    whole = reference.decode(q, keys, values, seqs, args)
    first = replace(seqs, held=seqs.held.clone().fill_(60), longest=60)
    rest = Sequences(seqs.starts + 60, seqs.held.clone().fill_(30), 30)
    without = replace(args, sink_logits=None)
    parts = [choose.decode(q, keys, values, first, args), choose.decode(q, keys, values, rest, without)]
    assert error(merge(parts), whole) < TOLERANCE[torch.float64]


def test_merging_with_nothing_changes_nothing() -> None:
    q, keys, values, seqs, args = DecodeCase(2, 64, probs=Probs.HEADS).make()
    nothing = replace(seqs, held=torch.zeros_like(seqs.held))
    whole = choose.decode(q, keys, values, seqs, args)
    merged = merge([whole, choose.decode(q, keys, values, nothing, args)])
    torch.testing.assert_close(merged.out, whole.out)


def test_a_named_kernel_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.SETTING, "cuda")
    with pytest.raises(RuntimeLimitError, match="KVPLAN_KERNELS is 'cuda'; it must be one of auto, torch, flash"):
        choose.available(torch.zeros(1))


def test_triton_is_not_chosen_on_a_cpu_or_where_torch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose.available(torch.zeros(1))
    monkeypatch.setenv(choose.SETTING, "torch")
    assert not choose.available(torch.zeros(1))


def _run(script: str, *arguments: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _too_far(errors: dict[str, float], allowed: float, allowed_in_16_bits: float) -> dict[str, float]:
    limits = {name: allowed_in_16_bits if "float16" in name else allowed for name in errors}
    return {name: size for name, size in errors.items() if not size < limits[name]}


@needs_triton
def test_triton_kernels_equal_the_reference_under_the_interpreter() -> None:
    errors = _run("kernel_cases.py", **{"TRITON_INTERPRET": "1", choose.SETTING: "triton"})
    assert len(errors) == len(DECODE_CASES) + len(QUANTIZED_CASES) + len(COLUMNS_CASES)
    assert _too_far(errors, TOLERANCE[torch.float32], TOLERANCE[torch.float16]) == {}


@needs_triton
def test_triton_kernels_build_for_a_gpu_without_spilling(tmp_path: Path) -> None:
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    spilled = _run("kernel_builds.py", **settings)
    assert spilled
    assert set(spilled.values()) == {0}, spilled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_kernels_equal_the_reference_on_a_gpu() -> None:
    errors = _run("kernel_cases.py", "cuda", **{"TRITON_INTERPRET": "0", choose.SETTING: "triton"})
    assert _too_far(errors, 1e-4, 0.03) == {}


def test_a_sequence_that_holds_nothing_gives_zeros() -> None:
    q, keys, values, seqs, args = DECODE_CASES["one query"].make()
    for wants in (Probs.NONE, Probs.MEAN):
        decoded = choose.decode(q, keys, values, seqs, DecodeArgs(args.scaling, probs=wants))
        assert not decoded.out[3].any()
