"""A finished or running study, read without touching it: its trials, and which parameter mattered."""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages.journal import JournalFileBackend

from kvplan.errors import StudyError
from kvplan.search.claims import LABEL, SCORES, SHARE
from kvplan.search.confirm import SEARCHED
from kvplan.search.shared import IDENTITY
from kvplan.search.storage import open_storage

TOP_SHARE = 0.1  # of the trials, whose choices are compared with all others
MIN_TRIALS = 10  # fewer say nothing about a parameter


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study holds it.

    Attributes:
        label: What a warm start is called, or `search` where the sampler chose.
        params: By Optuna's names.
        kl: Per search prompt, in nats; nan where the trial has none.
        share: Planned bytes, of the full cache's, 0 to 1; None where the study does not say.
    """

    number: int
    label: str
    params: Mapping[str, Any]
    kl: tuple[float, ...]
    share: float | None = None

    @property
    def is_warm_start(self) -> bool:
        return self.label != SEARCHED

    @property
    def is_valid(self) -> bool:
        return bool(self.kl) and all(map(math.isfinite, self.kl))

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl) if self.kl else math.nan


@dataclass(frozen=True)
class StudyRecord:
    """A study as data.

    Attributes:
        trials: Those that were scored, in order.
        importance: Of each searched parameter, summing to 1; empty with too few trials, or where all are alike.
        groups: The layers that were decided together, by the letter of the group.
    """

    trials: tuple[TrialRecord, ...]
    importance: Mapping[str, float]
    groups: Mapping[str, tuple[int, ...]]

    @property
    def shares(self) -> tuple[float, float]:
        """The least and the most that any trial holds, of the full cache's bytes; (0, 0) where the study is silent."""
        held = [trial.share for trial in self.trials if trial.share is not None]
        return min(held, default=0.0), max(held, default=0.0)


def is_study(path: Path) -> bool:
    """Whether the file begins like a journal."""
    with path.open("rb") as file:
        return re.match(rb'\{"op_code": ?\d', file.read(32)) is not None


def read_study(path: Path) -> StudyRecord:
    """The study in a journal, which another process may be writing.

    Raises:
        StudyError: the file cannot be read or holds no study of kvplan's, or no trial was scored.
    """
    # Optuna opens journals for writing; a copy leaves the file, and whoever writes it, alone.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "journal"
        try:
            copy.write_bytes(path.read_bytes())
        except OSError as error:
            raise StudyError(f"{path}: cannot read the search ({error.strerror})") from error
        try:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(copy)))
            study = storage.get_all_studies()[0]
            attributes, trials = study.user_attrs, storage.get_all_trials(study._study_id, deepcopy=False)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
            raise StudyError(f"{path}: not a search that kvplan wrote") from error
    return _study(attributes, trials, str(path))


def read_stored_study(address: str, name: str | None) -> StudyRecord:
    """A study where `kvplan search --storage` keeps it: on a server, or in a file.

    Raises:
        StudyError: the storage cannot be reached, holds no such study, or no trial was scored.
    """
    with _silent(), open_storage(address, create=False) as opened:
        study = opened.load(name)
        return _study(study.user_attrs, study.get_trials(deepcopy=False), opened.where)


def _study(attributes: Mapping[str, Any], trials: Sequence[optuna.trial.FrozenTrial], where: str) -> StudyRecord:
    groups = attributes.get(IDENTITY, {}).get("space", {}).get("groups", [])
    scored = [trial for trial in trials if SCORES in trial.user_attrs]
    if not scored:
        raise StudyError(f"{where}: no trial of this search has been scored yet")
    return StudyRecord(
        trials=tuple(map(_record, scored)),
        importance=_importance(trials),
        groups={chr(ord("a") + i): tuple(layers) for i, layers in enumerate(groups)},
    )


def _record(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    kl = tuple(math.nan if x is None else float(x) for x in trial.user_attrs[SCORES]["kl"])
    label = str(trial.user_attrs.get(LABEL, SEARCHED))
    return TrialRecord(trial.number, label, trial.params, kl, trial.user_attrs.get(SHARE))


def _importance(trials: Sequence[optuna.trial.FrozenTrial]) -> dict[str, float]:
    """PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255): how much the best trials' choices stand out, summing to 1."""
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    # What never varied cannot matter, and in few trials the estimate of it is anything.
    common = set.intersection(*(set(trial.params) for trial in complete)) if complete else set()
    varied = [name for name in sorted(common) if len({trial.params[name] for trial in complete}) > 1]
    if len(complete) < MIN_TRIALS or not varied:
        return {}
    with _silent():
        study = optuna.create_study(directions=["minimize"] * len(complete[0].values))
        study.add_trials(complete)
        evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE)
        try:
            found = get_param_importances(study, evaluator=evaluator, params=varied)
        except (ValueError, RuntimeError):  # all scored the same
            return {}
    return {name: share for name, share in found.items() if math.isfinite(share)}


@contextmanager
def _silent() -> Iterator[None]:
    """Optuna's talk is not the reader's business."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
