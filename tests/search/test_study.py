from __future__ import annotations

import errno
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages.journal import JournalFileBackend
from search_fakes import FakeProfile, FakeScore, total_kl

from kvplan.errors import StudyError, TargetError
from kvplan.policy.schema import Policy, Target
from kvplan.policy.serialize import load_policy, save_policy
from kvplan.report.search import summary, trial_line
from kvplan.search.confirm import SearchResult, TrialRow, hold_out, state
from kvplan.search.objective import Judge, Objective
from kvplan.search.samplers import make_sampler
from kvplan.search.study import search
from kvplan.stats import PromptScores
from tests.rooms import room

SEARCH, CONFIRM = list(range(8)), list(range(8, 12))
TRIALS, SEARCHED = 17, 3  # all warm starts, and those that the sampler chooses


def run(score: FakeScore, trials: int = TRIALS, **options: Any) -> SearchResult:
    profile = options.pop("profile", FakeProfile())
    target = options.pop("target", Target(share=4000))
    return search(
        profile, profile.spec, target, score, search_prompts=SEARCH, confirm_prompts=CONFIRM, trials=trials, **options
    )


@pytest.fixture(scope="module")
def plain() -> tuple[SearchResult, FakeScore]:
    score = FakeScore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run(score), score


def test_every_warm_start_is_tried(plain: tuple[SearchResult, FakeScore]) -> None:
    labels = [row.label for row in plain[0].trials]
    assert {"knapsack", "uniform streaming", "squeeze h2o", "pyramid h2o", "tilt 3 profile"} <= set(labels)
    assert len(labels) == TRIALS and labels.count("search") == SEARCHED


def test_the_winner_is_no_worse_than_any_trial_or_recipe(plain: tuple[SearchResult, FakeScore]) -> None:
    result = plain[0]
    assert total_kl(result.policy) == min(total_kl(f.trial.policy) for f in result.finalists)
    assert result.recipe is not None and result.gain is not None
    assert result.gain.mean > 0
    uniform = [total_kl(row.policy) for row in result.trials if row.label.startswith("uniform")]
    assert total_kl(result.policy) < 0.5 * min(uniform)


def test_trials_and_confirmation_use_their_own_prompts(plain: tuple[SearchResult, FakeScore]) -> None:
    result, score = plain
    prompts = [asked for _, asked in score.calls]
    first = prompts.index(CONFIRM)
    assert all(asked == SEARCH for asked in prompts[:first])
    assert prompts[first:] == [CONFIRM] * len(result.finalists)
    assert 2 <= len(result.finalists) <= 7


def test_prompts_are_prepared_before_they_are_scored_and_finalists_are_counted(tmp_path: Path) -> None:
    score, journal = FakeScore(), tmp_path / "study.journal"
    prepared: list[tuple[list[int], int]] = []
    steps: list[tuple[int, int]] = []

    def again(trials: int) -> SearchResult:
        prepared.clear(), steps.clear(), score.calls.clear()
        return run(
            score,
            trials,
            storage=journal if trials else None,
            prepare=lambda prompts: prepared.append((list(prompts), len(score.calls))),
            on_confirm=lambda done, total: steps.append((done, total)),
        )

    found = again(4)
    count = len(found.finalists)
    assert prepared == [(SEARCH, 0), (CONFIRM, len(score.calls) - count)]
    assert steps == [(n, count) for n in range(count + 1)]
    again(4)  # every trial is in the journal
    assert prepared == [(CONFIRM, 0)]
    again(0)
    assert prepared == [(CONFIRM, 0)] and steps == [(0, 1), (1, 1)]


def test_no_policy_is_scored_twice(plain: tuple[SearchResult, FakeScore]) -> None:
    searched = [policy.layers for policy, asked in plain[1].calls if asked == SEARCH]
    assert len(set(searched)) == len(searched)


def test_the_policy_states_target_bytes_and_score(plain: tuple[SearchResult, FakeScore], tmp_path: Path) -> None:
    result = plain[0]
    stated = result.policy.provenance
    assert result.policy.target == Target(share=4000)
    assert stated["planned"]["bytes"] == result.bytes.total <= 0.4 * stated["planned"]["full_bytes"]
    assert stated["search"]["prompts"] == "confirmation" and stated["search"]["num_prompts"] == 4
    assert "kl_95" not in stated["search"]  # of four prompts
    searched = state(result.policy, result.trials[0], 9, 0, FakeProfile().spec).provenance["search"]
    low, high = searched["kl_95"]
    assert searched["num_prompts"] == len(SEARCH) >= 5 and low <= searched["kl"] <= high
    save_policy(result.policy, tmp_path / "policy.yaml")
    assert load_policy(tmp_path / "policy.yaml").layers == result.policy.layers


def test_the_same_seed_gives_the_same_search(plain: tuple[SearchResult, FakeScore]) -> None:
    again, other = run(FakeScore()), run(FakeScore(), seed=1)
    assert [row.params for row in again.trials] == [row.params for row in plain[0].trials]
    assert again.policy == plain[0].policy
    assert [row.params for row in other.trials] != [row.params for row in plain[0].trials]


def test_a_killed_search_resumes_and_counts_as_an_unbroken_one(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    for fail_at in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            run(FakeScore(fail_at=fail_at), storage=journal)
    score = FakeScore()
    earlier: list[TrialRow] = []
    new: list[TrialRow] = []
    result = run(
        score,
        storage=journal,
        on_resume=earlier.extend,
        on_trial=lambda row, best, done: new.append(row),
    )
    assert len(result.trials) == TRIALS
    assert result.resumed >= 7
    assert (*earlier, *new) == result.trials and len(earlier) == result.resumed
    assert len([1 for _, asked in score.calls if asked == SEARCH]) <= TRIALS - result.resumed
    labels = [row.label for row in result.trials if row.label != "search"]
    assert len(set(labels)) == len(labels) == TRIALS - SEARCHED
    rerun = FakeScore()
    assert run(rerun, storage=journal).policy.layers == result.policy.layers
    assert all(asked == CONFIRM for _, asked in rerun.calls)


def test_a_journal_with_half_a_line_is_read(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    run(FakeScore(), trials=4, storage=journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    assert run(FakeScore(), trials=6, storage=journal).resumed == 4


def test_a_resumed_search_with_other_inputs_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    run(FakeScore(), trials=2, storage=journal, identity={"data": "a"})
    with pytest.raises(
        StudyError, match="holds a search that differs in target; give another --storage, or delete the file"
    ):
        run(FakeScore(), trials=2, storage=journal, identity={"data": "a"}, target=Target(share=5000))
    with pytest.raises(StudyError, match="differs in data; "):
        run(FakeScore(), trials=2, storage=journal, identity={"data": "b"})


def test_a_storage_that_is_no_search_is_refused(tmp_path: Path) -> None:
    for text in ("hello\nworld\n", '{"a": 1}\n{"b": 2}\n', "[1]\n[2]\n"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(StudyError, match="not a search that kvplan wrote; give another --storage"):
            run(FakeScore(), storage=tmp_path / "other")
        assert (tmp_path / "other").read_text() == text
    with pytest.raises(StudyError, match="cannot write the search there"):
        run(FakeScore(), storage=tmp_path / "missing" / "study")


def test_the_best_so_far_is_always_on_disk(tmp_path: Path) -> None:
    path, best = tmp_path / "policy.yaml", []

    def on_best(policy: Policy) -> None:
        save_policy(policy, path)
        best.append(policy)

    with pytest.raises(KeyboardInterrupt):
        run(FakeScore(fail_at=9), on_best=on_best)
    tried = [total_kl(policy) for policy in best]
    assert tried == sorted(tried, reverse=True)
    assert load_policy(path).layers == best[-1].layers
    assert load_policy(path).provenance["search"]["prompts"] == "search"


def test_nan_scores_fail_their_trial_and_are_counted() -> None:
    result = run(FakeScore(nan_at=(1, 3)), trials=8)
    assert result.num_failed == 2
    assert len(result.trials) == 8
    assert all(math.isfinite(f.kl) for f in result.finalists)


def test_only_nan_scores_are_an_error() -> None:
    with pytest.raises(StudyError, match="no trial gave a score: 3 were tried, and all were nan"):
        run(FakeScore(nan_at=range(1, 99)), trials=3)


EXHAUSTED = {
    1: MemoryError(),
    3: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    4: RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
}


def test_a_trial_out_of_memory_is_skipped_counted_and_told(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run(
        FakeScore(exhausted_at=EXHAUSTED, nan_at=[2]),
        trials=8,
        storage=tmp_path / "s.journal",
        on_trial=lambda row, best, done: lines.append(trial_line(row, 0.4, row is best)),
    )
    assert (len(result.trials), result.num_failed, result.num_out_of_memory) == (8, 4, 3)
    assert "out of memory, skipped" in lines[0] and "no score" in lines[1]
    told = summary(result).plain
    assert "3 of 8 trials ran out of memory and were not used" in told
    assert "1 of 8 trials scored nan and were not used" in told
    again = run(FakeScore(), trials=9, storage=tmp_path / "s.journal")
    assert (again.resumed, again.num_out_of_memory) == (8, 3)


@pytest.mark.parametrize("calls", [range(1, 99), range(4, 99)])
def test_only_trials_out_of_memory_are_an_error(calls: Sequence[int]) -> None:
    told = "3 ran out of memory" if 1 in calls else "on the confirmation prompts: all were nan or out of memory"
    with pytest.raises(StudyError, match=told):
        run(FakeScore(exhausted_at={call: MemoryError() for call in calls}), trials=3)


def test_another_failure_of_a_trial_is_not_skipped() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run(FakeScore(exhausted_at={2: RuntimeError("a bug")}), trials=3)


def test_a_trial_out_of_memory_meets_no_floor_and_stops_no_search() -> None:
    judge = Judge(Objective("kl", {"a": 0.5}), ["a"] * 12)
    result = run(FakeScore(exhausted_at=EXHAUSTED), trials=8, judge=judge)
    assert result.num_out_of_memory == 3


def test_no_trials_is_the_knapsack_scored_on_the_confirmation_prompts() -> None:
    score = FakeScore()
    result = run(score, trials=0)
    assert [asked for _, asked in score.calls] == [CONFIRM]
    assert result.winner.trial.label == "knapsack" and result.trials == ()


def test_the_held_out_third_has_every_task() -> None:
    tasks = ["a", "b", "c"] * 8
    search_prompts, confirm_prompts = hold_out(tasks)
    assert sorted(search_prompts + confirm_prompts) == list(range(24))
    assert len(confirm_prompts) == 8
    assert {tasks[i] for i in confirm_prompts} == {"a", "b", "c"}
    assert hold_out(["a", "a"]) == ([0, 1], [])


def test_a_timeout_ends_the_search_with_a_policy() -> None:
    assert len(run(FakeScore(), trials=50, timeout=0).trials) == 1


def test_an_infeasible_target_fails_before_any_score(tmp_path: Path) -> None:
    score = FakeScore()
    with pytest.raises(TargetError, match="target 1% is below the smallest policy"):
        run(score, target=Target(share=100), storage=tmp_path / "study")
    assert not score.calls and not (tmp_path / "study").exists()


def test_optuna_speaks_as_before_afterwards() -> None:
    before = optuna.logging.get_verbosity()
    run(FakeScore(), trials=1)
    assert optuna.logging.get_verbosity() == before


def test_a_long_search_uses_tpe() -> None:
    assert isinstance(make_sampler("auto", 251, 0, 0), optuna.samplers.TPESampler)
    assert isinstance(make_sampler("auto", 250, 0, 0), optuna.samplers.GPSampler)


@pytest.mark.parametrize("data", [b"weights without a line end", b'{"op', b""])
def test_only_half_a_journal_line_is_ever_cut(tmp_path: Path, data: bytes) -> None:
    storage = tmp_path / "x"
    storage.write_bytes(data)
    if data.startswith(b"w"):
        with pytest.raises(StudyError, match="not a search that kvplan wrote"):
            run(FakeScore(), storage=storage, trials=1)
        assert storage.read_bytes() == data
    else:
        run(FakeScore(), storage=storage, trials=1)


def test_a_full_disk_names_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, logs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    with pytest.raises(StudyError, match=r"s: cannot write the search there \(No space left on device\)"):
        run(FakeScore(), storage=tmp_path / "s", trials=1)


def test_a_disk_that_is_really_full_names_the_journal_and_the_rerun_goes_on(tmp_path: Path) -> None:
    whole = run(FakeScore(), storage=tmp_path / "whole", trials=6)
    size = (tmp_path / "whole").stat().st_size
    with (
        room(size - 2000),
        pytest.raises(StudyError, match=r"s: cannot write the search there \(File too large\); the same"),
    ):
        run(FakeScore(), storage=tmp_path / "s", trials=6)
    again = run(FakeScore(), storage=tmp_path / "s", trials=6)
    assert 0 < again.resumed < 6 and again.policy == whole.policy


def test_a_floor_decides_before_the_kl_does() -> None:
    class Skilled(FakeScore):
        """A skill that only unencoded, large first layers have; everything else is as it was."""

        def __call__(self, policy: Policy, prompts: Sequence[int]) -> PromptScores:
            scores = super().__call__(policy, prompts)
            right = policy.layers[0].slots.is_full
            return replace(scores, task=(float(right),) * len(prompts))

    tasks = ["a"] * 12
    free, held = (run(Skilled(), 20, judge=Judge(Objective("kl", floors), tasks)) for floors in ({}, {"a": 0.9}))
    assert held.winner.rank[0] == 0.0 and held.policy.layers[0].slots.is_full
    assert not free.policy.layers[0].slots.is_full
    assert free.winner.kl < held.winner.kl
    assert {row.rank[0] for row in held.trials} == {0.0, 0.9}


def test_the_sampler_can_be_random_and_random_has_its_own_study(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    found = run(FakeScore(), 16, sampler="random", storage=journal)
    assert len(found.trials) == 16
    with pytest.raises(StudyError, match="differs in sampler"):
        run(FakeScore(), 17, sampler="gp", storage=journal)
