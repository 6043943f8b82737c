from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvplan.search.claims import LABEL, MAX_RETRIES, SCORES, Ledger, interrupt, is_given_up, void
from kvplan.search.heartbeat import BEAT, Owner, Watch, beating

STARTS = {"a": {"x": 1.0}, "b": {"x": 2.0}, "c": {"x": 3.0}}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def new_study() -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def queue(study: optuna.Study, total: int, starts: dict[str, Any] = STARTS) -> int:
    owed = Ledger.read(study, total).owed(starts)
    for params, attrs in owed:
        study.enqueue_trial(params, user_attrs=attrs)
    return len(owed)


def finish(study: optuna.Study, trial: optuna.Trial) -> None:
    trial.suggest_float("x", 0, 9)
    trial.set_user_attr(SCORES, {})
    study.tell(trial, 1.0)


def labels(study: optuna.Study, total: int) -> list[str | None]:
    return [trial.user_attrs.get(LABEL) for trial in Ledger.read(study, total).done]


def test_warm_starts_are_queued_once_and_no_more_than_the_total() -> None:
    study = new_study()
    assert queue(study, 2) == 2
    assert queue(study, 2) == 0
    assert queue(study, 9) == 1


def test_a_start_queued_by_two_processes_at_once_is_run_once() -> None:
    study = new_study()
    for _ in range(2):
        study.enqueue_trial(STARTS["a"], user_attrs={LABEL: "a"})
    first, second = study.ask(), study.ask()
    ledger = Ledger.read(study, 9)
    assert ledger.may_run(first.number) and not ledger.may_run(second.number)


def test_of_two_trials_for_one_place_the_later_is_one_too_many() -> None:
    study = new_study()
    first, second = study.ask(), study.ask()
    ledger = Ledger.read(study, 1)
    assert [ledger.may_run(first.number), ledger.may_run(second.number)] == [True, False]
    void(study, second._trial_id)
    finish(study, first)
    assert Ledger.read(study, 1).is_complete and not Ledger.read(study, 1).may_start


def test_an_interrupted_trial_is_queued_again_with_its_parameters_and_label() -> None:
    study = new_study()
    queue(study, 2)
    assert interrupt(study, study.ask()._trial_id)
    assert queue(study, 2) == 1 and queue(study, 2) == 0
    while Ledger.read(study, 2).may_start:
        finish(study, study.ask())
    assert sorted(labels(study, 2)) == ["a", "b"]
    assert {t.params["x"] for t in Ledger.read(study, 2).done} == {1.0, 2.0}


def test_an_ended_trial_cannot_be_interrupted() -> None:
    study = new_study()
    trial = study.ask()
    finish(study, trial)
    assert not interrupt(study, trial._trial_id)
    void(study, trial._trial_id)
    assert len(Ledger.read(study, 1).done) == 1


def test_a_trial_that_kills_its_processes_is_given_up_and_counts() -> None:
    study = new_study()
    queue(study, 1)
    for _ in range(MAX_RETRIES + 1):
        assert not Ledger.read(study, 1).is_complete
        interrupt(study, study.ask()._trial_id)
        queue(study, 1)
    ledger = Ledger.read(study, 1)
    assert ledger.is_complete and is_given_up(ledger.done[0]) and not ledger.may_start


@settings(max_examples=150, deadline=None)
@given(total=st.integers(1, 6), steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=60))
@example(total=1, steps=[(0, 0)] * 4 + [(1, 0), (3, 0), (0, 0), (0, 0), (1, 0), (1, 0), (2, 0), (3, 0), (0, 0)])
def test_whatever_happens_the_total_is_exact(total: int, steps: list[tuple[int, int]]) -> None:
    """Workers ask, check, finish and die in any order; in the end one worker finishes the study."""
    study = new_study()
    asked: list[optuna.Trial] = []
    running: list[optuna.Trial] = []
    for action, which in steps:
        ledger = Ledger.read(study, total)
        if action == 0 and (ledger.may_start or which == 0):  # with 0: it looked before others took the last place
            asked.append(study.ask())
        elif action == 1 and asked:
            trial = asked.pop(which % len(asked))
            if ledger.may_run(trial.number):
                running.append(trial)
            else:
                void(study, trial._trial_id)
        elif action == 2 and running:
            finish(study, running.pop(which % len(running)))
        elif action == 3:
            pool = running if which % 2 else asked
            if pool:
                interrupt(study, pool.pop(which % len(pool))._trial_id)
            queue(study, total)
        assert len(Ledger.read(study, total).done) <= total
    for trial in [*asked, *running]:
        interrupt(study, trial._trial_id)
    for _ in range(200):
        queue(study, total)
        ledger = Ledger.read(study, total)
        if ledger.is_complete:
            break
        assert ledger.may_start
        trial = study.ask()
        if Ledger.read(study, total).may_run(trial.number):
            finish(study, trial)
        else:
            void(study, trial._trial_id)
    done = Ledger.read(study, total).done
    assert len(done) == total
    found = [trial.user_attrs[LABEL] for trial in done if LABEL in trial.user_attrs]
    assert len(set(found)) == len(found)


def test_a_process_knows_itself_alive_and_others_dead() -> None:
    here = Owner.here()
    assert not here.is_dead()
    if here.machine:
        assert Owner(here.machine, 2**22 + 1, "1").is_dead()
        assert Owner(here.machine, here.pid, "another start").is_dead()
    assert not Owner("another machine", 1, "1").is_dead()


def test_without_a_sign_of_life_a_trial_is_dead_after_the_grace() -> None:
    study, now = new_study(), [0.0]
    watch = Watch(grace=10, clock=lambda: now[0])
    trial = study.ask()

    def dead(at: float, beat: int | None = None) -> bool:
        now[0] = at
        if beat is not None:
            sign = {"owner": {"machine": "another", "pid": 1, "started": "1"}, "count": beat}
            study._storage.set_trial_system_attr(trial._trial_id, BEAT, sign)
        return bool(watch.dead(Ledger.read(study, 9).running))

    assert not dead(0) and not dead(9, beat=0) and not dead(19) and not dead(100, beat=1)
    assert dead(111)
    watch.forget()  # the storage was away
    assert not dead(112) and not dead(121) and dead(123)


def test_a_trial_of_a_process_known_to_be_dead_is_dead_at_once() -> None:
    if not Owner.here().machine:
        pytest.skip("this system does not tell which processes live")
    study = new_study()
    trial = study.ask()
    gone = {"owner": {"machine": Owner.here().machine, "pid": 2**22 + 1, "started": "1"}, "count": 0}
    study._storage.set_trial_system_attr(trial._trial_id, BEAT, gone)
    assert Watch(grace=1e9).dead(Ledger.read(study, 9).running)


def test_a_running_trial_shows_signs_of_life() -> None:
    import time

    study = new_study()
    trial = study.ask()
    with beating(study, trial._trial_id, every=0.02):
        assert study.trials[0].system_attrs[BEAT]["count"] == 0
        deadline = time.monotonic() + 10
        while study.trials[0].system_attrs[BEAT]["count"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
