"""The main job on the bundled model: profile, a few trials, policy, text; and what the shipped policy is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvplan.calibrate.profile import Profile
from kvplan.cli.app import app
from kvplan.cli.demo import heldout_rows
from kvplan.cli.exits import run_app
from kvplan.policy.serialize import load_policy
from kvplan.units import parse_share

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


def kvplan(*args: object) -> int:
    return run_app(app, [str(a) for a in args])


def test_the_main_job(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profile, policy = workdir / "profile.json", workdir / "policy.yaml"
    assert kvplan("calibrate", "-o", profile, "--max-prompts", 6, "--sensitivity-prompts", 2) == 0
    assert kvplan("search", "--mem", "40%", "--profile", profile, "-o", policy, "--max-prompts", 12, "--trials", 4) == 0
    capfd.readouterr()
    prompt = "Code of Ala 4713. The passkey 1234. " * 70 + "Question: What is the code of Ala? Answer: Code of Ala"
    assert kvplan("run", "--policy", policy, "--json", "--max-new-tokens", 4, prompt) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["text"].strip()
    assert result["kv_bytes"] == result["kv_bytes_planned"]
    assert result["kv_ratio"] <= 0.4
    assert result["prompt_tokens"] > 700

    # The policy that a handful of trials finds already beats every uniform one on held-out prompts.
    rows = {r.name: r for r in heldout_rows(Profile.load(profile), load_policy(policy), parse_share("40%"), 12)}
    found = rows.pop("kvplan")
    assert found.share <= 0.4
    assert rows.pop("full cache").scores.mean_kl < 1e-6
    for row in rows.values():
        # A codec that stores the whole prompt in fewer bytes holds less; all others hold the same.
        fits_whole = row.name in ("uniform turboquant4", "uniform turboquant3", "uniform turboquant2")
        assert row.share < 0.3 if fits_whole else row.share == pytest.approx(found.share, abs=0.004)
        assert found.scores.mean_kl < row.scores.mean_kl, row.name


def test_the_bundled_model_recalls() -> None:
    from kvplan.demo.evaluate import documents, outcomes, score
    from kvplan.loading import load_model

    model, tokenizer, _ = load_model(None)
    for task, least in (("fact", 0.9), ("passkey", 0.9), ("facts", 0.85)):
        results = outcomes(model, documents(tokenizer, task, 8, 1024))
        assert score(task, 1024, results).value >= least
