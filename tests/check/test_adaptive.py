from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_results import row

from kvplan.check.adaptive import Asked, Outcome, check, evenly
from kvplan.check.criteria import Limits
from kvplan.check.gate import State
from kvplan.check.results import PromptRow
from kvplan.errors import MemoryPlanExceeded

LIMITS = Limits(max_kl_rise=0.02, max_score_loss=0.03)
TASKS = ("facts", "hops", "story")


def prompts(n: int = 250, *, kl: float = 0.01, score: float = 1.0, seed: int = 0) -> list[PromptRow]:
    """`story` asks nothing; every fifth prompt holds its question."""
    noise = np.random.default_rng(seed).exponential(kl, n)
    return [
        row(
            f"p{i}",
            task=TASKS[i % 3],
            kl=float(noise[i]),
            score=None if i % 3 == 2 else score,
            full_score=None if i % 3 == 2 else 1.0,
            question_aware=i % 5 == 0,
        )
        for i in range(n)
    ]


def judged(rows: Sequence[PromptRow], base: Sequence[PromptRow] | None = None, **changes: object) -> Outcome:
    asked: list[Sequence[int]] = []

    def measure(names: Sequence[str], indices: Sequence[int]) -> Mapping[str, Sequence[PromptRow]]:
        asked.append(indices)
        return {name: [rows[i] for i in indices] for name in names}

    order = evenly([(r.task, r.question_aware) for r in rows], seed=0)
    given = {"name": "p", "limits": LIMITS, "base": base, **changes}
    (outcome,) = check(measure, [Asked(**given)], order)  # type: ignore[arg-type]
    assert sum(map(len, asked)) == outcome.prompts and list(chain(*asked)) == order[: outcome.prompts]
    return outcome


def worse(base: Sequence[PromptRow], kl: float = 0.0, score: float = 0.0, where: str | None = None) -> list[PromptRow]:
    """The same prompts with a loss in some tasks, or in all."""
    return [
        r
        if where not in (None, r.task)
        else replace(r, kl=r.kl + kl, score=None if r.score is None else r.score - score)
        for r in base
    ]


def states(outcome: Outcome) -> dict[str, State]:
    return {finding.name: finding.state for finding in outcome.findings}


def test_the_same_numbers_pass_early() -> None:
    base = prompts()
    outcome = judged(base, base, same_plan=True)
    assert (outcome.state, outcome.prompts, outcome.reproduced) == (State.PASS, 96, True)


def test_rounding_is_the_same_and_one_lost_answer_is_not() -> None:
    base = prompts()
    assert judged(worse(base, kl=0.001), base, same_plan=True).reproduced
    assert not judged(worse(base, score=0.5, where="hops"), base, same_plan=True).reproduced
    assert not judged(worse(base, kl=0.003), base, same_plan=True).reproduced


def test_the_same_numbers_on_all_of_a_few_prompts_pass() -> None:
    base = prompts(20)
    assert judged(base, base, same_plan=True).reproduced
    assert judged(base, base, same_plan=False).state is State.INCONCLUSIVE


def test_another_plan_must_pass_by_statistics_even_with_the_same_numbers() -> None:
    base = prompts()
    outcome = judged(base, base, same_plan=False)
    assert (outcome.state, outcome.reproduced) == (State.PASS, False)
    assert outcome.prompts > 96


def test_a_large_loss_ends_early() -> None:
    base = prompts()
    outcome = judged(worse(base, kl=0.5), base)
    assert (outcome.state, outcome.prompts) == (State.REGRESSION, 24)
    assert states(outcome)["KL rise"] is State.REGRESSION


def test_what_is_neither_is_inconclusive_after_all_prompts() -> None:
    base = prompts()
    outcome = judged(worse(base, kl=0.02), base)
    assert (outcome.state, outcome.prompts) == (State.INCONCLUSIVE, 250)


def test_a_lost_skill_does_not_hide_in_the_average() -> None:
    """One of ten tasks gone is 10 % of the score at most; with few prompts of it the mean alone would not tell."""
    base = [replace(r, task=f"t{i % 10}") for i, r in enumerate(prompts(score=1.0)) if r.score is not None]
    lost = worse(base, score=0.4, where="t3")
    outcome = judged(lost, base)
    assert outcome.state is State.REGRESSION
    assert states(outcome)["t3: score loss"] is State.REGRESSION
    assert states(outcome)["score loss"] is not State.REGRESSION


def test_a_task_without_scores_is_held_to_its_kl() -> None:
    base = prompts()
    outcome = judged(worse(base, kl=0.5, where="story"), base)
    assert states(outcome)["story: KL rise"] is State.REGRESSION
    assert "story: score loss" not in states(outcome)


def test_without_a_baseline_the_full_cache_is_the_measure() -> None:
    rows = prompts(score=0.99)
    assert judged(rows, limits=Limits(min_recovery=0.95)).state is State.PASS
    assert judged(prompts(score=0.8), limits=Limits(min_recovery=0.95)).state is State.REGRESSION
    assert judged(rows, limits=Limits(max_kl=0.001)).state is State.REGRESSION


def test_an_absolute_limit_holds_where_the_baseline_breaks_it_too() -> None:
    base = prompts(score=0.8)
    outcome = judged(base, base, same_plan=True, limits=replace(LIMITS, min_recovery=0.95))
    assert (outcome.state, outcome.prompts) == (State.REGRESSION, 24)
    assert states(outcome)["recovery loss"] is State.REGRESSION
    assert State.REGRESSION not in (states(outcome)["score loss"], states(outcome)["KL rise"])


@pytest.mark.parametrize(("change", "name"), [
    ({"planned_bytes": 41}, "bytes planned"),
    ({"kv_bytes": 41}, "bytes held"),
    ({"full_bytes": 99}, "bytes of full cache's"),
])  # fmt: skip
def test_bytes_are_exact(change: dict[str, int], name: str) -> None:
    base = [replace(r, kv_bytes=40) for r in prompts()]
    limits = replace(LIMITS, max_bytes=4000)
    assert judged(base, base, same_plan=True, limits=limits).state is State.PASS
    over = [replace(r, **change) for r in base]
    outcome = judged(over, base, same_plan=True, limits=limits)
    assert states(outcome)[name] is State.REGRESSION and outcome.prompts == 24


def test_a_cache_above_its_plan_is_a_regression_of_that_policy_alone() -> None:
    base = prompts()

    def measure(names: Sequence[str], indices: Sequence[int]) -> Mapping[str, Sequence[PromptRow]]:
        if "b" in names:
            raise MemoryPlanExceeded("b.yaml: a cache holds 41 bytes")
        return {name: [base[i] for i in indices] for name in names}

    asked = [Asked(name=name, limits=LIMITS, base=base, same_plan=True) for name in "ab"]
    good, bad = check(measure, asked, range(250))
    assert (good.state, good.prompts) == (State.PASS, 96)
    assert (bad.state, bad.prompts, bad.broken) == (State.REGRESSION, 24, "b.yaml: a cache holds 41 bytes")


def test_a_decided_policy_is_measured_no_more() -> None:
    base, steps = prompts(), []

    def measure(names: Sequence[str], indices: Sequence[int]) -> Mapping[str, Sequence[PromptRow]]:
        steps.append((list(names), len(indices)))
        rows = {"bad": worse(base, kl=0.5), "same": base, "unclear": worse(base, kl=0.02)}
        return {name: [rows[name][i] for i in indices] for name in names}

    check(
        measure,
        [Asked(name=n, limits=LIMITS, base=base, same_plan=True) for n in ("bad", "same", "unclear")],
        range(250),
    )
    assert steps == [
        (["bad", "same", "unclear"], 24),
        (["same", "unclear"], 24),
        (["same", "unclear"], 48),
        (["unclear"], 154),
    ]


def test_the_most_harmed_prompts_are_named() -> None:
    base = prompts(40)
    rows = [replace(r, kl=r.kl + (5.0 if r.id == "p7" else 0.0)) for r in base]
    assert judged(rows, base).harmed == (("p7", pytest.approx(5.0)),)  # none of the others lost anything


def test_every_kind_comes_at_its_share_of_any_first_part() -> None:
    kinds = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    order = evenly(kinds, seed=3)
    assert sorted(order) == list(range(100)) and order == evenly(kinds, seed=3) != evenly(kinds, seed=4)
    first = [kinds[i] for i in order[:20]]
    assert abs(first.count("a") - 12) <= 1 and abs(first.count("b") - 6) <= 1 and abs(first.count("c") - 2) <= 1
