"""A study is read as data, without being touched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from search_fakes import FakeProfile, FakeScore

from kvplan.errors import StudyError
from kvplan.policy.memory import plan
from kvplan.policy.schema import Target
from kvplan.search.confirm import SearchResult
from kvplan.search.study import search
from kvplan.search.trials import is_study, read_study


def run(path: Path, trials: int = 16, **score: object) -> SearchResult:
    profile = FakeProfile()
    return search(
        profile, profile.spec, Target(share=4000), FakeScore(**score), search_prompts=range(8),  # type: ignore[arg-type]
        confirm_prompts=range(8, 12), trials=trials, storage=path,
    )  # fmt: skip


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    path = tmp_path_factory.mktemp("study") / "x.journal"
    return path, run(path)


def test_trials_are_those_of_the_search(journal: tuple[Path, SearchResult]) -> None:
    path, result = journal
    before = path.read_bytes()
    record = read_study(path)
    assert [t.number for t in record.trials] == [row.number for row in result.trials]
    assert [t.label for t in record.trials] == [row.label for row in result.trials]
    assert [t.mean_kl for t in record.trials] == pytest.approx([row.kl for row in result.trials])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_planned_share_is_that_of_the_policy(journal: tuple[Path, SearchResult]) -> None:
    path, result = journal
    spec = FakeProfile().spec
    for trial, row in zip(read_study(path).trials, result.trials, strict=True):
        assert trial.share == plan(row.policy, spec, [result.context_tokens]).ratio


def test_importances_are_of_the_searched_parameters_and_sum_to_one(journal: tuple[Path, SearchResult]) -> None:
    record = read_study(journal[0])
    searched = set().union(*(trial.params for trial in record.trials))
    assert set(record.importance) <= searched and record.importance
    assert sum(record.importance.values()) == pytest.approx(1.0)
    assert all(set(layers) <= set(range(8)) for layers in record.groups.values())


def test_a_parameter_that_never_varied_has_no_importance(tmp_path: Path) -> None:
    run(tmp_path / "x.journal", trials=10)
    record = read_study(tmp_path / "x.journal")
    constant = {name for name in record.trials[0].params if len({t.params[name] for t in record.trials}) == 1}
    assert constant and record.importance and not constant & set(record.importance)
    assert sum(record.importance.values()) == pytest.approx(1.0)


def test_few_trials_say_nothing_about_parameters(tmp_path: Path) -> None:
    run(tmp_path / "x.journal", trials=4)
    assert read_study(tmp_path / "x.journal").importance == {}


def test_a_trial_without_a_score_is_not_valid(tmp_path: Path) -> None:
    run(tmp_path / "x.journal", trials=6, nan_at=[2])
    found = read_study(tmp_path / "x.journal").trials
    assert [t.is_valid for t in found] == [True, False, True, True, True, True]
    assert math.isnan(found[1].mean_kl)


def test_a_search_that_is_running_or_was_killed_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    with pytest.raises(KeyboardInterrupt):
        run(path, fail_at=4)
    with path.open("ab") as file:
        file.write(b'{"op_code":')
    assert [t.number for t in read_study(path).trials] == [0, 1, 2]


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "x.journal"
    other.write_text("{}\n")
    assert not is_study(other)
    with pytest.raises(StudyError, match="not a search that kvplan wrote"):
        read_study(other)
    with pytest.raises(StudyError, match="cannot read"):
        read_study(tmp_path / "none")


def test_a_front_over_targets_is_read_with_the_share_of_each_trial(tmp_path: Path) -> None:
    path, profile = tmp_path / "x.journal", FakeProfile()
    search(
        profile, profile.spec, Target(share=5000), FakeScore(), search_prompts=range(8), confirm_prompts=range(8, 12),
        trials=30, storage=path, shares=(1000, 2500, 5000),
    )  # fmt: skip
    record = read_study(path)
    least, most = record.shares
    assert least < 0.2 < 0.45 < most <= 0.5
    assert sum(record.importance.values()) == pytest.approx(1.0)
