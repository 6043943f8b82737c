"""A study's file: Optuna's journal, safe against being killed at any point and against two searches at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from kvplan.errors import StudyError

IDENTITY = "identity"
INTERRUPTED = "interrupted"
_FIRST = b'{"op_code":'


class _HeldLock(JournalFileOpenLock):
    """The whole search holds the file already. Unlike Optuna's locks, the kernel drops ours when the process dies."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


@contextmanager
def open_study(
    path: Path | None, identity: Mapping[str, Any], sampler_of: Callable[[int], optuna.samplers.BaseSampler]
) -> Iterator[optuna.Study]:
    """Create a study, or go on with the one in `path`; in memory when None.

    Trials that a dead process left running are failed and queued again.

    Args:
        path: The journal.
        identity: What the search depends on, as plain data. A study of another identity is refused.
        sampler_of: Called with the number of trials already in the study; returns the sampler.

    Raises:
        StudyError: the file cannot be used, is another search's, or is in use.
    """
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    if path is None:
        yield optuna.create_study(sampler=sampler_of(0))
        return
    try:
        file = path.open("ab")
    except OSError as error:
        raise StudyError(f"{path}: cannot write the search there ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(f"{path}: another search is using it") from error
        try:
            _drop_torn_line(path)
            study = _load(path, plain, sampler_of)
            _requeue_interrupted(study)
            yield study
        except OSError as error:
            if error.filename is not None:
                raise
            # The journal is the only file that is written through an open handle.
            raise StudyError(
                f"{path}: cannot write the search there ({error.strerror}); the same command goes on from it"
            ) from error


def _load(
    path: Path, identity: dict[str, Any], sampler_of: Callable[[int], optuna.samplers.BaseSampler]
) -> optuna.Study:
    name = "kvplan-" + hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=_HeldLock(str(path))))
        studies = storage.get_all_studies()
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise StudyError(f"{path}: not a search that kvplan wrote; give another --storage") from error
    for other in studies:
        if other.study_name != name:
            theirs = other.user_attrs.get(IDENTITY, {})
            keys = sorted(k for k in {*identity, *theirs} if identity.get(k) != theirs.get(k))
            raise StudyError(
                f"{path}: holds a search with another {', '.join(keys) or 'name'}; give another --storage, or delete "
                "the file to start again"
            )
    started = len(storage.get_all_trials(studies[0]._study_id)) if studies else 0
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, sampler=sampler_of(started))
    if IDENTITY not in study.user_attrs:
        study.set_user_attr(IDENTITY, identity)
    return study


def _drop_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line, which would spoil the next one."""
    data = path.read_bytes()
    if not data[: len(_FIRST)].startswith(_FIRST[: len(data)]):
        raise StudyError(f"{path}: not a search that kvplan wrote; give another --storage")  # and never cut it
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _requeue_interrupted(study: optuna.Study) -> None:
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        attrs = {k: v for k, v in trial.user_attrs.items() if k == "label"}
        # Queue first: killed in between, the trial runs twice at worst, and is never lost.
        study.enqueue_trial(params, user_attrs=attrs)
        study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
