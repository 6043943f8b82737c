"""Whatever a file holds: an error of a line or a few, or an object that what comes next can use.

500 examples of each kind; `pytest --hypothesis-profile nightly` takes 25,000.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from mutations import Node, damaged, damaged_lines
from valid_files import SPEC, as_file, front, policies, profile, prompts, results

from kvplan.calibrate.profile import Profile
from kvplan.calibrate.prompts import data_fingerprint, load_examples
from kvplan.check.results import load_results, save_results
from kvplan.errors import KVPlanError, PolicyError
from kvplan.policy.memory import plan, stated_spec
from kvplan.policy.rules import check_model
from kvplan.policy.schema import Policy, Target
from kvplan.policy.serialize import dump_policy, load_policy, parse_policy
from kvplan.report.policy import picture
from kvplan.search.front_file import choose, load_front

fuzzed = settings(
    max_examples=25_000 if settings.get_current_profile_name() == "nightly" else 500,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MAX_LINE = 1000

POLICIES = [Node.of(data) for data in policies()]
PROFILES = [Node.of(as_file(profile()))]
RESULTS = [Node.of(as_file(results()))]
FRONTS = [Node.of(front())]
RECORDS = [Node.of(data) for data in prompts()]


def assert_readable(error: KVPlanError) -> None:
    """A line for each problem, of a length that can be read, without what a terminal would obey."""
    lines = error.problems if isinstance(error, PolicyError) else [str(error)]
    assert lines
    for line in lines:
        assert line.strip() and len(line) <= MAX_LINE, line[:200]
        assert line.isprintable(), ascii(line)[:400]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from kvplan.loading import BUNDLED_FOLDER

    return AutoTokenizer.from_pretrained(BUNDLED_FOLDER)


@fuzzed
@given(data=damaged(POLICIES))
def test_policies(here: Path, data: bytes) -> None:
    path = here / "p.yaml"
    path.write_bytes(data)
    try:
        policy = load_policy(path)
    except KVPlanError as error:
        return assert_readable(error)
    assert dump_policy(parse_policy(dump_policy(policy))) == dump_policy(policy)
    use_policy(policy)


def use_policy(policy: Policy) -> None:
    """Plan its bytes on the model that it states, and draw it."""
    if {"layers", "kv_heads", "head_dim", "dtype"} <= set(policy.model):
        try:
            spec = stated_spec(policy)
            check_model(policy, spec)
        except KVPlanError as error:
            return assert_readable(error)
        held = plan(policy, spec, [1, 700], 3)
        assert held.total >= 0 and held.full > 0
    try:
        picture(policy, 700)
    except KVPlanError as error:
        assert_readable(error)


@fuzzed
@given(data=damaged(FRONTS))
def test_fronts(here: Path, data: bytes) -> None:
    path = here / "p.front.json"
    path.write_bytes(data)
    try:
        point, policy = choose(load_front(path), 4000, str(path))
    except KVPlanError as error:
        return assert_readable(error)
    assert 0 <= point.share <= 0.4
    use_policy(policy)


@fuzzed
@given(data=damaged(PROFILES))
def test_profiles(here: Path, data: bytes) -> None:
    from kvplan.report.profile import table

    path = here / "profile.json"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            loaded = Profile.load(path)
        except KVPlanError as error:
            return assert_readable(error)
        json.dumps(loaded.summary(), allow_nan=False)
        assert table(loaded).plain.replace("\n", "").isprintable()
        loaded.save(path)
        assert Profile.load(path).to_json() == loaded.to_json()
        search_in(loaded)


def search_in(loaded: Profile) -> None:
    """Compile what the profile suggests at 40 %."""
    from kvplan.search.budget import Protection
    from kvplan.search.compile import budget_for
    from kvplan.search.decisions import decisions
    from kvplan.search.space import space_for

    try:
        budget = budget_for(loaded, loaded.spec, Target(share=4000), Protection())
        compiler, space = space_for(loaded, budget, decisions(8), [], None, None)
        for start in space.warm_starts():
            compiled = compiler.compile(start.params, {})
            assert plan(compiled, loaded.spec, [budget.context_tokens]).total > 0
    except KVPlanError as error:
        assert_readable(error)


@fuzzed
@given(data=damaged(RESULTS))
def test_results(here: Path, data: bytes) -> None:
    from rich.console import Console

    from kvplan.check.summary import by_question, summaries
    from kvplan.report.eval import tables

    path = here / "results.json"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            loaded = load_results(path)
        except KVPlanError as error:
            return assert_readable(error)
        for group in by_question(loaded):
            summaries(loaded, group)
        console = Console(width=80, file=io.StringIO())
        for shown in tables(loaded):
            console.print(shown)
        save_results(loaded, path)
        assert load_results(path) == loaded


@fuzzed
@given(data=damaged_lines(RECORDS))
def test_prompts(here: Path, tokenizer: Any, data: bytes) -> None:
    path = here / "prompts.jsonl"
    path.write_bytes(data)
    try:
        examples = load_examples([path], tokenizer, context_limit=SPEC.max_context_tokens)
    except KVPlanError as error:
        return assert_readable(error)
    data_fingerprint(examples)
    for example in examples:
        assert example.prompt_ids and all(0 <= i < len(tokenizer) for i in example.prompt_ids)
        assert all(0 <= a < b <= len(example.continuation_ids) for a, b in example.answers)
