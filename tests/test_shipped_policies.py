"""Every policy in policies/ loads, fits the bundled model, and holds its stated bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvplan.loading import load_model
from kvplan.policy.memory import plan
from kvplan.policy.serialize import check_model, load_policy

SHIPPED = sorted((Path(__file__).parents[1] / "policies").rglob("*.yaml"))


def test_there_are_shipped_policies() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_fits_the_bundled_model_and_its_stated_bytes(path: Path) -> None:
    policy = load_policy(path)
    _, _, spec = load_model(None)
    check_model(policy, spec)
    stated = policy.provenance["planned"]
    held = plan(policy, spec, [stated["prompt_tokens"]])
    assert held.total == stated["bytes"]
    assert held.full == stated["full_bytes"]
    for prompt_tokens in (1000, 2000):
        assert plan(policy, spec, [prompt_tokens]).ratio <= policy.target.share / 10_000
