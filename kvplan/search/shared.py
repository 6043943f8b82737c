"""SharedStudy: a study that several processes work on, with its definition, its identity and its total."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from kvplan.errors import StudyError
from kvplan.search.claims import Ledger, interrupt, void
from kvplan.search.definition import Definition, differences, study_name
from kvplan.search.heartbeat import BEATS_PER_GRACE, Watch, beating
from kvplan.search.storage import Storage

IDENTITY, DEFINITION, TOTAL = "identity", "definition", "trials"


class SharedStudy:
    """A study in a storage.

    Args:
        storage: Where it is.
        study: Optuna's.
        definition: How it was created.
        identity: What must be equal for a process to take part.
    """

    def __init__(
        self, storage: Storage, study: optuna.Study, definition: Definition, identity: Mapping[str, Any]
    ) -> None:
        self.storage, self.study, self.definition, self.identity = storage, study, definition, identity
        self.name = study.study_name
        self._watch, self._losses = Watch(definition.stale_after), storage.num_losses
        self._total = int(study.user_attrs.get(TOTAL, 0))

    @classmethod
    def create(
        cls,
        storage: Storage,
        name: str | None,
        definition: Definition,
        identity: Mapping[str, Any],
        trials: int,
        starts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> SharedStudy:
        """Create a study of `trials` trials, with its warm starts in the queue, or go on with the one that is there.

        Raises:
            StudyError: the one that is there is of another identity.
        """
        names = storage.study_names()
        if not storage.is_server and names:
            name = names[0]
        name = name or study_name(identity)
        directions = [optuna.study.StudyDirection.MINIMIZE] * definition.num_objectives
        study = optuna.create_study(
            storage=storage.backend, study_name=name, load_if_exists=True, directions=directions
        )
        attrs = study.user_attrs
        if IDENTITY not in attrs:
            # Before anybody can join: all at once, they would each queue the warm starts, and void all but one of each.
            for params, labels in Ledger.read(study, trials).owed(starts or {}):
                study.enqueue_trial(params, user_attrs=labels)
            # Two that create one study at once write the same, or the second finds out below.
            study.set_user_attr(DEFINITION, definition.to_json())
            study.set_user_attr(IDENTITY, dict(identity))
            attrs = study.user_attrs
        if different := differences(identity, attrs[IDENTITY]):
            raise StudyError(
                f"{storage.where}: holds a search that differs in {', '.join(different)}; "
                + (
                    "give another --study"
                    if storage.is_server
                    else "give another --storage, or delete the file to start again"
                )
            )
        if trials > int(attrs.get(TOTAL, 0)):
            study.set_user_attr(TOTAL, trials)
        return cls(storage, study, Definition.from_json(attrs[DEFINITION]), attrs[IDENTITY])

    @classmethod
    def join(cls, storage: Storage, name: str | None) -> SharedStudy:
        """A study that a search has created.

        Raises:
            StudyError: there is none, or it is none of kvplan's.
        """
        study = storage.load(name)
        attrs = study.user_attrs
        if IDENTITY not in attrs or DEFINITION not in attrs:
            raise StudyError(f"{storage.where}: study '{study.study_name}' was not created by kvplan search")
        try:
            definition = Definition.from_json(attrs[DEFINITION])
        except StudyError as error:
            theirs = attrs[IDENTITY].get("kvplan", "unknown")
            raise StudyError(f"{storage.where}: study '{study.study_name}' (kvplan {theirs}): {error}") from error
        return cls(storage, study, definition, attrs[IDENTITY])

    def refuse_other(self, mine: Mapping[str, Any], hints: Mapping[str, str] | None = None) -> None:
        """Refuse to take part with other inputs.

        Args:
            mine: The parts of the identity that are known so far.
            hints: What to do about a difference, by its name.

        Raises:
            StudyError: naming every difference.
        """
        different = differences(mine, {key: self.identity.get(key) for key in mine})
        if different:
            told = "; ".join(f"{key} {self.identity.get(key)} (here {mine[key]})" for key in different)
            todo = "".join(f"; {hints[key]}" for key in different if hints and key in hints)
            raise StudyError(f"study '{self.name}' was created with {told}{todo}")

    @property
    def total(self) -> int:
        """How many trials shall get done; a search may raise it at any time."""
        self._total = max(self._total, int(self.study.user_attrs.get(TOTAL, 0)))
        return self._total

    def has_all(self, done: int) -> bool:
        """Whether so many are all. Asks the storage only then: it would send the whole definition along."""
        return done >= self._total and done >= self.total

    def ledger(self) -> Ledger:
        return Ledger.read(self.study, self._total)

    def tidy(self, ledger: Ledger, starts: Mapping[str, Mapping[str, Any]]) -> tuple[Ledger, list[FrozenTrial]]:
        """Fail the trials of dead processes, and queue what should be in the queue.

        Returns:
            The ledger as it is now, and the trials that were failed here.
        """
        if self.storage.num_losses != self._losses:
            self._losses = self.storage.num_losses
            self._watch.forget()
        dead = [t for t in self._watch.dead(ledger.running) if interrupt(self.study, t._trial_id)]
        if dead:
            ledger = self.ledger()
        owed = ledger.owed(starts)
        for params, attrs in owed:
            self.study.enqueue_trial(params, user_attrs=attrs)
        return (self.ledger() if owed else ledger), dead

    def claim(self) -> optuna.Trial | None:
        """A trial of the queue or a new one, and None when it turned out to be one too many.

        From here on it is this process's: run it within `alive`, then tell it, `void` or `interrupt` it.
        """
        trial = self.study.ask()
        if self.ledger().may_run(trial.number):
            return trial
        void(self.study, trial._trial_id)
        return None

    def release(self, trial: optuna.Trial) -> None:
        """Give a trial back, as far as the storage can still be reached: it is queued again."""
        self.storage.hurry()
        with suppress(Exception):
            interrupt(self.study, trial._trial_id)

    def alive(self, trial: optuna.Trial) -> Any:
        """Context in which the trial shows signs of life."""
        return beating(self.study, trial._trial_id, self.definition.stale_after / BEATS_PER_GRACE)
