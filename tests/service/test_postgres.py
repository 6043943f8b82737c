"""Studies on a real PostgreSQL server: workers, one killed, and the server restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "search"))
from fake_process import SEARCH, fake_search, num_starts
from postgres_server import PASSWORD, Server
from search_fakes import FakeScore, spec_of

from kvplan.errors import StudyError
from kvplan.search.shared import SharedStudy
from kvplan.search.storage import open_storage
from kvplan.search.trials import read_stored_study
from kvplan.search.worker import work

pytestmark = pytest.mark.service
PROCESS = [sys.executable, str(Path(__file__).parents[1] / "search" / "fake_process.py")]


def start(role: str, url: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROCESS, role, url, "study", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scored(log: Path) -> list[tuple[int, str]]:
    """Process and policy of each trial that was begun."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(pid, policy) for pid, policy, prompts in lines if prompts == len(SEARCH)]


def kill_within_a_trial(worker: subprocess.Popen[str], log: Path) -> None:
    def count() -> int:
        return sum(pid == worker.pid for pid, _ in scored(log))

    before = count()
    wait(lambda: count() > before)
    os.kill(worker.pid, signal.SIGKILL)


def test_three_workers_one_killed_and_the_server_restarted(server: Server, url: str, tmp_path: Path) -> None:
    trials, log = 30, tmp_path / "log"
    options = ("--seconds", "0.6", "--log", str(log))
    first = start("search", url, "--trials", str(trials), "--stale-after", "30", *options)
    wait(lambda: bool(scored(log)))
    workers = [start("worker", url, *options) for _ in range(3)]
    wait(lambda: {w.pid for w in workers} <= {pid for pid, _ in scored(log)})
    kill_within_a_trial(workers[0], log)
    begun = len(scored(log))
    server.stop()
    time.sleep(2)
    server.start()
    told, talk = first.communicate(timeout=120)
    assert first.returncode == 0, talk
    found = json.loads(told)
    worked = []
    for worker in workers[1:]:
        told, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        worked.append(json.loads(told))
        talk += errors
    workers[0].communicate()
    assert begun < trials, "the server was restarted when all was done"
    assert len(found["rows"]) == trials
    assert all(w["done"] == w["total"] == trials for w in worked)
    assert found["others"] > 0 and all(w["own"] > 0 for w in worked)
    labels = [label for _, label in found["rows"] if label != "search"]
    assert len(set(labels)) == len(labels) == num_starts(trials)
    assert "its process died; it is tried again" in talk
    assert "connection lost; trying again" in talk and "connected again" in talk
    assert PASSWORD not in talk
    # The killed trial once more; and a policy twice only where two processes drew it at the same moment.
    assert len(scored(log)) <= trials + 1
    assert len(scored(log)) - len({policy for _, policy in scored(log)}) <= 4
    alone = fake_search(None, trials)
    assert found["kl"] <= alone.winner.kl * 1.1 + 0.01


def test_a_trial_of_another_host_is_tried_again_when_it_shows_no_sign_of_life(url: str, tmp_path: Path) -> None:
    with open_storage(url) as storage:
        with pytest.raises(KeyboardInterrupt):
            fake_search(url, 6, FakeScore(fail_at=3), stale_after=2.0)
        shared = SharedStudy.join(storage, None if len(storage.study_names()) != 1 else storage.study_names()[0])
        shared.study.ask()  # no sign of life, and no process here that runs it
        told: list[str] = []
        started = time.monotonic()
        worked = work(shared, spec_of(), FakeScore(), say=told.append)
    assert worked.done == worked.total == 6
    assert time.monotonic() - started > 2.0
    assert any("its process died; it is tried again" in line for line in told)


def test_studies_of_one_server_are_told_apart(url: str) -> None:
    fake_search(url, 2, study="mine", identity={"data": "a"})
    assert fake_search(url, 2, study="mine", identity={"data": "a"}).resumed == 2
    with pytest.raises(StudyError, match="holds a search that differs in data; give another --study"):
        fake_search(url, 2, study="mine", identity={"data": "b"})
    assert fake_search(url, 2, identity={"data": "b"}).resumed == 0
    assert fake_search(url, 2, identity={"data": "b"}).resumed == 2
    with open_storage(url) as storage:
        assert len(storage.study_names()) == 2
        with pytest.raises(StudyError, match="say with --study which one"):
            SharedStudy.join(storage, None)


def test_what_cannot_be_reached_is_one_line_without_the_password(server: Server, url: str) -> None:
    wrong = [
        (server.url(password="hunter2"), "password authentication failed"),
        (server.url(database="none"), 'database "none" does not exist'),
        (url.replace(f":{server.port}/", ":1/"), "failed"),
        ("postgresql+psycopg://u:hunter2@127.0.0.1:1", "names no database; write postgresql"),
        ("postgresql+psycopg://u:hunter2@x@127.0.0.1:1/d", "write an @ in a password as %40"),
        ("postgresql+psycopg://u:hunter2@127.0.0.1:port/d", "not a URL that can be read"),
        ("mysql://u:hunter2@127.0.0.1/d", "'mysql' is not supported"),
        ("sqlite:///x.db", "'sqlite' is not supported"),
    ]
    for address, reason in wrong:
        with pytest.raises(StudyError) as caught, open_storage(address):
            pass
        assert reason in str(caught.value) and "\n" not in str(caught.value)
        assert "hunter2" not in str(caught.value) and PASSWORD not in str(caught.value)


def test_a_server_that_stays_away_ends_the_work_with_one_line(server: Server, url: str) -> None:
    from kvplan.search.postgres import parse_url, postgres

    told: list[str] = []

    def use() -> None:
        with postgres(parse_url(url), told.append, patience=1.0) as storage:
            storage.get_all_studies()
            server.stop()
            storage.get_all_studies()

    try:
        with pytest.raises(StudyError, match=r"for 1 s; the same command goes on from there") as caught:
            use()
    finally:
        server.start()
    assert PASSWORD not in str(caught.value)
    assert told == ["storage: connection lost; trying again for up to 1 s"]
    with open_storage(url) as storage:
        assert storage.study_names() == []


def test_writers_survive_restarts_whatever_they_were_doing(server: Server, url: str) -> None:
    """Three processes' worth of storages, made at once on an empty database, each used by two threads."""
    import threading

    import optuna

    failures: list[BaseException] = []
    stop, finished = threading.Event(), [0, 0, 0]

    def beat(study: optuna.Study, current: list[int]) -> None:
        while not stop.is_set():
            try:
                study._storage.set_trial_system_attr(current[0], "beat", time.time())
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
            except BaseException as error:
                failures.append(error)

    def use(index: int) -> None:
        try:
            with open_storage(url) as storage:
                study = optuna.create_study(storage=storage.backend, study_name="x", load_if_exists=True)
                current = [study.ask()._trial_id]
                other = threading.Thread(target=beat, args=(study, current))
                other.start()
                while not stop.is_set():
                    trial = study.ask()
                    current[0] = trial._trial_id
                    trial.suggest_float("x", 0, 1)
                    study.get_trials(deepcopy=False)
                    study.tell(trial, 1.0, skip_if_finished=True)
                    finished[index] += 1
                other.join()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(len(finished))]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(2)
        server.stop()
        server.start()
    wait(lambda: min(finished) > 0 or bool(failures))
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_a_report_reads_a_study_from_the_server(url: str) -> None:
    found = fake_search(url, 12, study="mine")
    record = read_stored_study(url, "mine")
    assert [(t.number, t.label) for t in record.trials] == [(row.number, row.label) for row in found.trials]
    assert [t.mean_kl for t in record.trials] == pytest.approx([row.kl for row in found.trials])
    assert record.importance and record.shares[1] > 0
    with pytest.raises(StudyError, match="no study 'other'") as error:
        read_stored_study(url, "other")
    assert PASSWORD not in str(error.value)
