from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvplan.check.bench import CUT, FULL, POLICY, POOL, bench
from kvplan.cli.app import app
from kvplan.cli.exits import run_app
from kvplan.errors import RuntimeLimitError
from kvplan.loading import load_model
from kvplan.policy.memory import plan
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.policy.serialize import save_policy

SMALL = ["--context", "40", "--batch", "2", "--new-tokens", "3", "--repeats", "2"]


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    model, _, spec = load_model()
    return model, spec


@pytest.fixture(scope="module")
def quarter(bundled: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = bundled[1]
    every = LayerPolicy(slots=Slots(share=5000), min_slots=20)
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    save_policy(Policy(layers=(every,) * spec.num_layers, model=spec.policy_block()), path)
    return path


def test_json_holds_all_four_caches_and_the_bytes_that_were_planned(
    quarter: Path, bundled: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(app, ["-q", "bench", "--policy", str(quarter), *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    caches = {row["name"]: row for row in told["caches"]}
    assert list(caches) == [FULL, POOL, CUT, POLICY]
    assert caches[FULL]["kv_bytes"] == caches[FULL]["full_kv_bytes"] == bundled[1].full_kv_bytes([43, 43])
    assert caches[CUT]["kv_bytes"] == bundled[1].full_kv_bytes([20, 20])  # after 3 new tokens too
    every = LayerPolicy(slots=Slots(share=5000), min_slots=20)
    policy = Policy(layers=(every,) * bundled[1].num_layers)
    assert caches[POLICY]["kv_bytes"] == plan(policy, bundled[1], [40, 40], 3).total
    assert caches[FULL]["speedup"]["median"] == 1.0
    assert all(row["tokens_per_second"]["low"] > 0 for row in caches.values())
    assert (told["context"], told["batch"], told["new_tokens"], told["repeats"]) == (40, 2, 3, 2)


def test_the_table_fits_80_columns(quarter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["-q", "bench", "--policy", str(quarter), *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 x 40 tokens, 3 new" in lines[0]
    assert [f"{name}:" in " ".join(lines) for name in (FULL, POOL, CUT)] == [True] * 3
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("change", ["shared", "chunked"])
def test_policies_whose_prompt_must_be_read_anew(bundled: tuple[Any, Any], change: str) -> None:
    model, spec = bundled
    every = LayerPolicy(slots=Slots(tokens=24))
    policy = Policy(layers=(every,) * spec.num_layers, model=spec.policy_block())
    if change == "shared":
        policy = replace(policy, layers=(*policy.layers[:-1], LayerPolicy(shares=spec.num_layers - 2)))
    else:
        policy = replace(policy, prefill_chunk_tokens=16)
    rows = bench(model, policy, spec, context=40, batch=1, new_tokens=2, repeats=1)
    assert rows[-1].kv_bytes == plan(policy, spec, [40], 2).total


def test_a_context_beyond_the_model_is_one_clear_error(quarter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["bench", "--policy", str(quarter), "--context", "1000000"]) != 0
    told = capsys.readouterr().err
    assert "1000000 tokens of context and 64 new ones are more than the model's" in told
    assert "lower --context to at most" in told


def test_the_library_refuses_it_too(bundled: tuple[Any, Any], quarter: Path) -> None:
    from kvplan.policy.serialize import load_policy

    with pytest.raises(RuntimeLimitError, match="lower --context"):
        bench(bundled[0], load_policy(quarter), bundled[1], context=10**6, batch=1, new_tokens=1, repeats=1)


def test_a_policy_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.yaml"
    save_policy(Policy(layers=(LayerPolicy(),) * 3), path)
    assert run_app(app, ["bench", "--policy", str(path), *SMALL]) != 0
    assert "3 layers" in capsys.readouterr().err


def test_a_missing_policy_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["bench", "--policy", str(tmp_path / "none.yaml")]) != 0
    assert capsys.readouterr().err.startswith("error: ")
