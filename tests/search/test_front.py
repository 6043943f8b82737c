from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from search_fakes import FakeProfile, FakeScore, total_kl

from kvplan.check.step_costs import BASE, FULL, Line, StepCosts
from kvplan.errors import StudyError, TargetError
from kvplan.policy.memory import plan
from kvplan.policy.schema import Target
from kvplan.report.front import front_data, front_notes, front_table, predictions
from kvplan.search.answer import Answer, answer
from kvplan.search.budget import Protection
from kvplan.search.compile import budget_for
from kvplan.search.confirm import SearchResult
from kvplan.search.decisions import BASIC, Decisions
from kvplan.search.front import feasible_shares
from kvplan.search.shared import SharedStudy
from kvplan.search.space import space_for
from kvplan.search.storage import open_storage
from kvplan.search.study import search

SEARCH, CONFIRM = list(range(8)), list(range(8, 12))
PROFILE: Any = FakeProfile()
SHARES = (1000, 2000, 3000, 4000)
FEW = Decisions(BASIC)


def run(trials: int, score: FakeScore | None = None, **options: Any) -> SearchResult:
    return search(
        PROFILE,
        PROFILE.spec,
        Target(share=options.pop("share", 4000)),
        score or FakeScore(),
        search_prompts=SEARCH,
        confirm_prompts=CONFIRM,
        trials=trials,
        decisions=FEW,
        **options,
    )


def answered(journal: Path, share: int) -> tuple[Answer, FakeScore]:
    score = FakeScore()
    with open_storage(journal, create=False) as opened:
        shared = SharedStudy.join(opened, None)
        return answer(shared, PROFILE.spec, Target(share=share), score, CONFIRM), score


def test_shares_of_a_front_are_the_feasible_round_ones_and_the_target() -> None:
    def compiled(target: Target) -> object:
        return space_for(PROFILE, budget_for(PROFILE, PROFILE.spec, target, Protection()), FEW)

    assert feasible_shares(2700, compiled) == (700, 1000, 1500, 2000, 2500, 2700)  # 6.4 % is the smallest


@pytest.mark.parametrize("trials", [0, 22])
def test_a_front_has_the_best_plan_at_every_memory(trials: int) -> None:
    found = run(trials, shares=SHARES)
    held = [plan(f.trial.policy, PROFILE.spec, [found.context_tokens]).ratio for f in found.front]
    losses = [total_kl(f.trial.policy) for f in found.front]
    assert held == sorted(held) and losses == sorted(losses, reverse=True) and len(held) == 4
    assert [f.trial.params.share for f in found.front] == list(SHARES)
    for share, f in zip(SHARES, found.front, strict=True):
        assert f.trial.policy.target == Target(share=share)
        alone = run(0, share=share)
        assert total_kl(f.trial.policy) <= total_kl(alone.policy) * 1.2
    assert found.policy.layers == found.front[-1].trial.policy.layers


def test_a_front_goes_on_from_its_file_and_is_not_a_search_at_one_memory(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    first = run(14, shares=SHARES, storage=journal)
    again = run(18, shares=SHARES, storage=journal)
    assert again.resumed == 14 and [r.policy for r in again.trials[:14]] == [r.policy for r in first.trials]
    with pytest.raises(StudyError, match="differs in space"):
        run(18, storage=journal)


def test_another_memory_is_answered_without_trials(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    searched = run(20, storage=journal)
    found, score = answered(journal, 2500)
    assert all(asked == CONFIRM for _, asked in score.calls) and len(score.calls) <= 8
    policy = found.result.policy
    assert policy.target == Target(share=2500)
    assert 0.24 < plan(policy, PROFILE.spec, [1000]).ratio <= 0.25
    # It is nearly as good as a search of its own, and as far off as it says at most.
    own = run(20, share=2500)
    assert found.roomier is not None and found.gap is not None
    assert total_kl(found.roomier.trial.policy) == total_kl(searched.winner.trial.policy)
    assert found.result.winner.kl - own.winner.kl <= found.gap.mean
    assert total_kl(policy) < 1.3 * total_kl(own.policy)


def test_a_front_answers_from_its_nearest_plans(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    front = run(22, shares=SHARES, storage=journal)
    found, _ = answered(journal, 2000)
    assert total_kl(found.result.policy) <= total_kl(front.front[1].trial.policy)
    assert found.roomier is not None and found.roomier.trial.params.share in (3000, 4000)


def test_more_memory_than_the_study_had_has_no_bound(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    run(3, storage=journal)
    found, _ = answered(journal, 6000)
    assert found.roomier is None and found.gap is None


def test_a_target_below_the_smallest_policy_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    run(3, storage=journal)
    with pytest.raises(TargetError, match="below the smallest policy"):
        answered(journal, 100)


def test_every_trial_of_a_front_has_a_predicted_speed() -> None:
    found = run(14, shares=SHARES)
    lines = {name: Line(0.1, 0.001) for name in (BASE, FULL, "evictor snapkv", "evictor h2o", "shares")}
    steps = StepCosts(1000, reference=10.0, floor=1.0, parts=lines)
    speeds = predictions(found, PROFILE.spec, steps)
    assert speeds == {row.number: steps.speedup(row.policy, PROFILE.spec) for row in found.trials}
    front = front_data(found, PROFILE.spec, {}, 0, steps)
    told = [point["predicted_speedup"] for point in front["points"]]
    assert told == [speeds[f.trial.number] for f in found.front]
    assert told == sorted(told, reverse=True)  # every slot costs the same here, so fewer bytes are faster
    assert front["step_costs"]["full_cache_ms"] == 10_000
    table = front_table(found, PROFILE.spec, {}, steps)
    assert [*table.columns[-1].cells] == [f"{speed:.2f}x" for speed in told]
    written = io.StringIO()
    screen = Console(width=80, file=written)
    screen.print(table, soft_wrap=True)
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and lines[2].split()[-2:] == ["decode", "predicted"]
    assert [note.split(":")[0] for note in front_notes({}, steps)] == ["of full", "predicted"]
    assert front_data(found, PROFILE.spec, {}, 0)["points"][0]["predicted_speedup"] is None
