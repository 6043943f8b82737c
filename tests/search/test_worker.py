from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_process import CONFIRM, SEARCH, fake_search
from search_fakes import FakeProfile, FakeScore, spec_of

from kvplan.errors import StudyError
from kvplan.search.definition import Definition, MeasuredProfile
from kvplan.search.shared import DEFINITION, IDENTITY, SharedStudy
from kvplan.search.storage import open_storage
from kvplan.search.worker import Worked, work

WARM_STARTS = 14
PROCESS = [sys.executable, str(Path(__file__).parent / "fake_process.py")]


def join(path: Path, score: FakeScore, **options: Any) -> Worked:
    with open_storage(path, create=False) as storage:
        return work(SharedStudy.join(storage, None), spec_of(), score, **options)


def test_a_worker_finishes_what_a_search_began_and_the_search_confirms(tmp_path: Path) -> None:
    path, score = tmp_path / "study", FakeScore()
    with pytest.raises(KeyboardInterrupt):
        fake_search(path, 18, FakeScore(fail_at=5))
    seen: list[int] = []
    worked = join(path, score, on_trial=lambda row, best, done: seen.append(done))
    assert worked == Worked(own=14, done=18, total=18)
    assert seen[-1] == 18 and all(asked == SEARCH for _, asked in score.calls)
    again = FakeScore()
    result = fake_search(path, 18, again)
    assert [asked for _, asked in again.calls] == [CONFIRM] * len(result.finalists)
    labels = [row.label for row in result.trials if row.label != "search"]
    assert len(result.trials) == 18 and len(set(labels)) == len(labels) == WARM_STARTS


def test_a_finished_study_has_nothing_for_a_worker(tmp_path: Path) -> None:
    fake_search(tmp_path / "study", 3, FakeScore())
    score = FakeScore()
    assert join(tmp_path / "study", score) == Worked(own=0, done=3, total=3)
    assert not score.calls


def test_a_worker_starts_no_trial_after_its_time(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fake_search(tmp_path / "study", 9, FakeScore(fail_at=3))
    assert join(tmp_path / "study", FakeScore(), timeout=0).done == 2


def test_two_searches_share_the_trials_of_one_storage(tmp_path: Path) -> None:
    path, inner = tmp_path / "study", []

    def nested(policy: object) -> None:
        if not inner:
            inner.append(None)
            inner.append(fake_search(path, 12, FakeScore()))

    outer = fake_search(path, 12, FakeScore(), on_best=nested)
    assert len(outer.trials) == len(inner[1].trials) == 12
    assert outer.by_others >= 11 and outer.policy.layers == inner[1].policy.layers


@pytest.mark.parametrize(
    ("mine", "told"),
    [
        ({"kvplan": "9.9"}, "with kvplan 0.1 (here 9.9); install the same version"),
        ({"data": "mine"}, "with data theirs (here mine); give its --data"),
        ({"kvplan": "9.9", "data": "mine"}, "with data theirs (here mine); kvplan 0.1 (here 9.9); "),
    ],
)
def test_a_worker_of_other_inputs_is_refused_by_name(tmp_path: Path, mine: dict[str, str], told: str) -> None:
    fake_search(tmp_path / "study", 1, FakeScore(), identity={"kvplan": "0.1", "data": "theirs"})
    with pytest.raises(StudyError) as caught:
        join(tmp_path / "study", FakeScore(), identity=mine)
    assert told in str(caught.value)


def test_a_worker_of_another_model_is_refused(tmp_path: Path) -> None:
    fake_search(tmp_path / "study", 1, FakeScore())
    with open_storage(tmp_path / "study") as storage:
        shared = SharedStudy.join(storage, None)
        with pytest.raises(StudyError, match=r"with model sha256:fake \(here sha256:other\); give its --model"):
            work(shared, replace(spec_of(), fingerprint="sha256:other"), FakeScore())


def test_a_storage_without_a_study_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(StudyError, match="no such file; kvplan search creates it"),
        open_storage(tmp_path / "none", create=False),
    ):
        pass
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").touch()
    with open_storage(tmp_path / "empty") as storage, pytest.raises(StudyError, match=r"no study \(it holds none\)"):
        SharedStudy.join(storage, None)
    fake_search(tmp_path / "study", 1, FakeScore(), study="mine")
    with open_storage(tmp_path / "study") as storage:
        with pytest.raises(StudyError, match=r"no study 'other' \(there: mine\)"):
            SharedStudy.join(storage, "other")
        shared = SharedStudy.join(storage, None)
        shared.study.set_user_attr(DEFINITION, {"profile": 3})
        with pytest.raises(StudyError, match="was not written by this version of kvplan"):
            SharedStudy.join(storage, "mine")


def test_a_definition_survives_its_storage(tmp_path: Path) -> None:
    fake_search(tmp_path / "study", 1, FakeScore(), codecs=["dense"], evictors=["h2o", "snapkv"])
    with open_storage(tmp_path / "study") as storage:
        attrs = SharedStudy.join(storage, None).study.user_attrs
    definition = Definition.from_json(json.loads(json.dumps(attrs[DEFINITION])))
    assert definition.profile == MeasuredProfile.of(FakeProfile())
    assert definition.evictors == ("h2o", "snapkv") and definition.codecs == ("dense",)
    again = json.loads(json.dumps(definition.identity(spec_of(), *definition.space(spec_of()))))
    assert again == {key: attrs[IDENTITY][key] for key in again}


def start(role: str, path: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROCESS, role, str(path), "study", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_share_a_file_and_one_killed_loses_only_its_trial(tmp_path: Path) -> None:
    path, log = tmp_path / "study", tmp_path / "log"
    options = ("--seconds", "0.2", "--log", str(log))
    first = start("search", path, "--trials", "20", *options)
    deadline = time.monotonic() + 60
    while not log.exists():  # the study is there, and a trial runs
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    victim, other = start("worker", path, *options), start("worker", path, *options)
    while str(victim.pid) not in log.read_text() and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    told, errors = first.communicate(timeout=60)
    found = json.loads(told)
    worked = json.loads(other.communicate(timeout=60)[0])
    victim.communicate()
    assert worked["done"] == worked["total"] == 20 == len(found["rows"])
    labels = [label for _, label in found["rows"] if label != "search"]
    assert len(set(labels)) == len(labels) == WARM_STARTS
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    searched = [policy for _, policy, prompts in lines if prompts == len(SEARCH)]
    assert len(searched) <= len(found["rows"]) + 1  # the killed trial twice
