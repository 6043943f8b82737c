from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvplan.check.results import (
    FULL_CACHE,
    Cost,
    DataIdentity,
    ModelIdentity,
    PolicyResult,
    PromptRow,
    Results,
    load_results,
    save_results,
)
from kvplan.errors import ResultsError


def row(name: str, **changes: Any) -> PromptRow:
    given = {
        "id": name, "task": "niah", "context_tokens": 700, "question_aware": False, "tokens": 10, "kl": 0.25,
        "top1": 0.5, "nll": 1.5, "full_nll": 1.25, "planned_bytes": 40, "kv_bytes": 39, "full_bytes": 100,
        "scorer": "f1", "score": 0.5, "full_score": 1.0, "answers": ("ja, \u00e9\n",),
    }  # fmt: skip
    return PromptRow(**{**given, **changes})


def results() -> Results:
    cost = Cost(context_tokens=700, planned_bytes=40, kv_bytes=39, full_bytes=100, peak_bytes=60, new_tokens=8,
                tokens_per_second=(10.0, 9.0, 11.0), speedup=(1.0, 0.9, 1.1))  # fmt: skip
    full = tuple(row(name, kl=0.0, score=1.0) for name in "ab")
    return Results(
        tool={"kvplan": "0.1.0"},
        model=ModelIdentity(name="bundled", type="qwen3", fingerprint="sha256:1", dtype="bfloat16", layers=8),
        data=DataIdentity(fingerprint="sha256:2", sources=("x.jsonl",), prompts=2),
        policies=(
            PolicyResult(name=FULL_CACHE, source=FULL_CACHE, fingerprint="sha256:3", rows=full),
            PolicyResult(name="p", source="p.yaml", fingerprint="sha256:4", rows=(row("a"), row("b")), cost=cost),
        ),
        seed=3,
        settings={"context": None, "scorer": "f1"},
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    save_results(results(), tmp_path / "r.json")
    assert load_results(tmp_path / "r.json") == results()
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["kvplan_results"] == 1


def test_bytes_are_summed_over_prompts() -> None:
    policy = results().policy("p")
    assert (policy.planned_bytes, policy.kv_bytes, policy.full_bytes) == (80, 78, 200)
    assert results().full.name == FULL_CACHE


def edited(tmp_path: Path, edit: Any) -> Path:
    data = json.loads(json.dumps(results().to_json()))
    edit(data)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    return path


BROKEN = {
    "another version": (lambda d: d.update(kvplan_results=2), "results of format 2, this kvplan reads format 1"),
    "no version": (lambda d: d.pop("kvplan_results"), "not a results file"),
    "a missing field": (lambda d: d["policies"][1]["rows"][0].pop("kl"), "policies.1.rows.0.kl: Field required"),
    "a field of another type": (
        lambda d: d["policies"][1]["rows"][0].update(kl="0"), "policies.1.rows.0.kl: Input should be a valid number"),
    "an unknown field": (lambda d: d["model"].update(size=1), "model.size: Unexpected keyword argument"),
    "no finite number": (lambda d: d["policies"][1]["rows"][0].update(kl=float("nan")), "policies.1.rows.0.kl"),
    "a number whose sums overflow": (
        lambda d: d["policies"][1]["rows"][0].update(kl=1e308), "policies.1.rows.0.kl: Input should be less than"),
    "a score above 1": (
        lambda d: d["policies"][1]["rows"][0].update(score=1.5), "policies.1.rows.0.score: Input should be less than"),
    "no full cache": (lambda d: d["policies"].pop(0), "no policy is named 'full cache'"),
    "two of one name": (lambda d: d["policies"][1].update(name=FULL_CACHE), "two policies are named 'full cache'"),
    "other prompts": (lambda d: d["policies"][1]["rows"].reverse(), "policy 'p' has rows of other prompts"),
    "rows lost everywhere": (lambda d: [p["rows"].pop() for p in d["policies"]], "or not 2 of them"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_says_where(tmp_path: Path, name: str) -> None:
    edit, told = BROKEN[name]
    path = edited(tmp_path, edit)
    with pytest.raises(ResultsError) as caught:
        load_results(path)
    assert told in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("kvplan: 1")
    with pytest.raises(ResultsError, match="not JSON"):
        load_results(tmp_path / "r.json")


def test_an_unknown_policy_is_named_with_those_there_are() -> None:
    with pytest.raises(ResultsError, match=r"no results of a policy 'q' \(there are: full cache, p\)"):
        results().policy("q")


def test_prompts_must_be_the_same_in_every_policy() -> None:
    made = results()
    with pytest.raises(ResultsError, match="other prompts"):
        replace(made, policies=(made.policies[0], replace(made.policies[1], rows=(row("a"), row("c")))))


def test_reading_results_needs_no_torch() -> None:
    code = "import sys, kvplan.check.results, kvplan.check.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
