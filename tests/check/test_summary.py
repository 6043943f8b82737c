from __future__ import annotations

import sys
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_results import results, row

from kvplan.check.results import Results
from kvplan.check.summary import (
    AGNOSTIC,
    AWARE,
    UNASKED,
    by_context,
    by_question,
    by_task,
    difference,
    length_label,
    summaries,
    summarise,
)
from kvplan.stats import bootstrap_ratio


def mixed() -> Results:
    """Four prompts: two tasks, two lengths, both ways of asking; the policy is right half of the time."""
    kinds = [("a", "t", 700, False), ("b", "t", 3000, False), ("c", "u", 700, False), ("d", "u", 700, True)]

    def rows(score: float, kl: float):  # type: ignore[no-untyped-def]
        return tuple(
            row(name, task=task, context_tokens=n, question_aware=aware, score=score, kl=kl)
            for name, task, n, aware in kinds
        )

    made = results()
    full, policy = made.policies
    return replace(
        made,
        data=replace(made.data, prompts=4),
        policies=(replace(full, rows=rows(1.0, 0.0)), replace(policy, rows=rows(0.5, 0.25))),
    )


def test_ways_of_asking_are_groups_of_their_own() -> None:
    groups = by_question(mixed())
    assert [(group.name, group.rows) for group in groups] == [(AGNOSTIC, (0, 1, 2)), (AWARE, (3,))]


def test_texts_that_only_go_on_are_apart_too() -> None:
    made = mixed()
    policies = tuple(
        replace(p, rows=(*p.rows[:3], replace(p.rows[3], questions=0, question_aware=False))) for p in made.policies
    )
    groups = by_question(replace(made, policies=policies))
    assert [(group.name, group.rows) for group in groups] == [(AGNOSTIC, (0, 1, 2)), (UNASKED, (3,))]


def test_they_are_never_averaged_together() -> None:
    with pytest.raises(AssertionError):
        summarise("p", mixed().policies[1].rows)


def test_groups_by_task_and_by_length() -> None:
    agnostic = by_question(mixed())[0]
    assert [(g.name, g.rows) for g in by_task(mixed(), agnostic)] == [("t", (0, 1)), ("u", (2,))]
    assert [(g.name, g.rows) for g in by_context(mixed(), agnostic)] == [("<=1k", (0, 2)), ("<=4k", (1,))]


@pytest.mark.parametrize(
    ("tokens", "label"), [(1, "<=2"), (64, "<=64"), (65, "<=128"), (1024, "<=1k"), (1025, "<=2k"), (32768, "<=32k")]
)
def test_lengths_are_counted_to_the_next_power_of_two(tokens: int, label: str) -> None:
    assert length_label(tokens) == label


def test_means_over_prompts() -> None:
    made = mixed()
    full, policy = summaries(made, by_question(made)[0])
    assert (policy.kl.mean, policy.score.mean, policy.recovery.mean, policy.score_change.mean) == (0.25, 0.5, 0.5, -0.5)  # type: ignore[union-attr]
    assert (full.kl.mean, full.recovery.mean, full.score_change.high) == (0.0, 1.0, 0.0)  # type: ignore[union-attr]
    assert (policy.planned_bytes, policy.kv_bytes, policy.full_bytes, policy.share) == (120, 117, 300, 0.39)
    assert policy.prompts == policy.scored == 3


def test_perplexity_is_over_tokens_not_prompts() -> None:
    found = summarise("p", [row("a", nll=1.0, tokens=30), row("b", nll=2.0, tokens=10)])
    assert found.perplexity == pytest.approx(exp(1.25))


def test_rows_without_an_answer_count_for_kl_alone() -> None:
    found = summarise("p", [row("a"), row("b", score=None, full_score=None, kl=0.75)])
    assert found.scored == 1 and found.score is not None and found.score.mean == 0.5 and found.kl.mean == 0.5
    none = summarise("p", [row("b", score=None, full_score=None)])
    assert none.score is None and none.recovery is None


def test_a_full_cache_that_knows_nothing_leaves_nothing_to_recover() -> None:
    assert summarise("p", [row("a", score=0.0, full_score=0.0)]).recovery is None


def test_differences_are_paired() -> None:
    base = [row(str(i), kl=float(i), score=float(i % 2)) for i in range(20)]
    worse = [replace(r, kl=r.kl + 0.5, score=(r.score or 0) - 0.25) for r in base]
    found = difference("p", worse, "q", base)
    # Prompts differ widely among themselves; the difference is the same on all of them.
    assert found.kl.low == pytest.approx(0.5) and found.kl.high == pytest.approx(0.5)
    assert found.score is not None and found.score.low == pytest.approx(-0.25)


def test_a_ratio_is_drawn_in_pairs() -> None:
    below = [0.1 * (i + 1) for i in range(30)]
    found = bootstrap_ratio([0.5 * b for b in below], below)
    assert found is not None and found.low == pytest.approx(0.5) and found.high == pytest.approx(0.5)
    assert bootstrap_ratio([0.0], [0.0]) is None
    assert bootstrap_ratio([0.5], [1e-310]) is None


def test_as_data_few_prompts_have_no_interval_and_scores_count_their_own_prompts() -> None:
    unscored = [row(f"n{i}", score=None, full_score=None, kl=i / 10) for i in range(4)]
    scored = [row(f"s{i}", score=i / 10, kl=0.5) for i in range(2)]
    told = summarise("p", unscored + scored).to_json()
    assert told["kl"]["low"] < told["kl"]["mean"] < told["kl"]["high"]
    assert told["score"] == {"mean": 0.05, "low": None, "high": None}
    few = summarise("p", scored).to_json()
    assert few["kl"] == {"mean": 0.5, "low": None, "high": None} and few["prompts"] == 2
