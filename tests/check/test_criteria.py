from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_results import results, row

from kvplan.check.criteria import Limits, baseline_policy, check_comparable, criteria, without_scores
from kvplan.check.gate import NATS, SHARE
from kvplan.errors import NotComparableError, ResultsError

ROWS = [
    row("a", task="t", kl=0.3, score=0.5, full_score=1.0),
    row("b", task="t", kl=0.1, score=0.25, full_score=0.5),
    row("c", task="u", kl=0.2, score=None, full_score=None),
]
BASE = [replace(r, kl=0.1, score=None if r.score is None else 0.75) for r in ROWS]


def test_losses_are_paired_with_the_baseline() -> None:
    kl, score, *_ = criteria(ROWS, BASE, Limits(max_kl_rise=0.02, max_score_loss=0.05))
    assert (kl.name, kl.unit, kl.limit) == ("KL rise", NATS, 0.02)
    assert kl.losses == pytest.approx((0.2, 0.0, 0.1))
    assert (score.name, score.unit, score.limit) == ("score loss", SHARE, 0.05)
    assert score.losses == pytest.approx((0.25, 0.5))


def test_recovery_is_a_share_of_the_full_caches_score() -> None:
    (recovery, *_) = criteria(ROWS, None, Limits(min_recovery=0.95))
    assert recovery.limit == pytest.approx(0.05)
    # (0.5 + 0.25) of (1.0 + 0.5) is a half.
    assert sum(recovery.losses) / 2 == pytest.approx(0.5)


def test_recovery_is_judged_as_its_ratio_is() -> None:
    """At exactly the allowed ratio, whatever the full cache's scores, the mean loss is exactly the limit."""
    rows = [row(str(i), score=0.9 * full, full_score=full) for i, full in enumerate((0.2, 0.7, 1.0))]
    (recovery,) = criteria(rows, None, Limits(min_recovery=0.9))
    assert recovery.losses == pytest.approx([0.1] * 3)


def test_tasks_have_floors_of_their_own() -> None:
    *_, first, second = criteria(ROWS, BASE, Limits(max_kl_rise=0.02, max_score_loss=0.05))
    assert (first.name, first.part, first.limit, first.share) == ("t: score loss", "t", 0.4, 0.5)
    assert (second.name, second.part, second.limit) == ("u: KL rise", "u", 0.16)
    assert second.losses == pytest.approx((0.1,))


def test_a_single_task_has_no_floor_but_ways_of_asking_have() -> None:
    rows = [row("a"), row("b", question_aware=True)]
    names = [c.name for c in criteria(rows, rows, Limits(max_kl_rise=0.02))]
    assert names == ["KL rise", "agnostic: KL rise", "aware: KL rise"]


def test_what_asks_nothing_has_no_score_to_lose() -> None:
    assert without_scores(Limits(max_score_loss=0.05), BASE[2:]).max_score_loss is None
    assert without_scores(Limits(max_score_loss=0.05), BASE).max_score_loss == 0.05


def test_the_policy_of_a_baseline_goes_by_name_or_is_the_only_one() -> None:
    assert baseline_policy(results(), "p").name == "p"
    assert baseline_policy(results(), "renamed").name == "p"
    made = results()
    several = replace(made, policies=(*made.policies, replace(made.policies[1], name="q")))
    assert baseline_policy(several, "q").name == "q"
    with pytest.raises(ResultsError, match="no results of a policy 'r' \\(there are: p, q\\); --update adds them"):
        baseline_policy(several, "r")


def test_other_models_and_prompts_are_not_comparable() -> None:
    made = results()
    check_comparable(made.model, made.data, made, "b.json")
    check_comparable(replace(made.model, name="renamed"), replace(made.data, sources=()), made, "b.json")
    with pytest.raises(
        NotComparableError, match="b.json: not comparable: dtype bfloat16 there, float32 here; "
    ) as told:
        check_comparable(replace(made.model, dtype="float32"), made.data, made, "b.json")
    assert told.value.exit_code == 4
    other = replace(made.data, fingerprint="sha256:9")
    with pytest.raises(
        NotComparableError, match="model qwen3 8 sha256:1 there, .*; prompts 2 sha256:2 there, 2 sha256:9"
    ):
        check_comparable(replace(made.model, fingerprint="sha256:8"), other, made, "b.json")
