"""Which trials of a study count, and who may start one: rules over the list of all trials, the same for every process.

Optuna numbers trials one after the other, whoever creates them; that order alone decides, so processes never have to
talk to each other. A trial is

- *done* when its scores are in the storage (or when it was retried in vain too often);
- *void* when it turned out to be one too many, or somebody else's already;
- *interrupted* when its process died: it is queued again, by whoever sees it first;
- *live* when it is done, running or waiting in the queue.

A trial may run when fewer than `total` live trials have smaller numbers, and none with a smaller number is the same
item of the queue. The live trials before a trial only ever become fewer, so no more than `total` can get done. A trial
that was retried in vain counts only where it might have run: its processes may have died before they looked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

LABEL, SCORES, SHARE, OUT_OF_MEMORY = "label", "scores", "share", "out_of_memory"
_VOID, _RETRY_OF, _RETRIES = "void", "retry_of", "retries"
MAX_RETRIES = 2  # a policy that kills its process (out of memory) would else do so for ever


@dataclass(frozen=True)
class Ledger:
    """A snapshot of a study's trials, sorted out.

    Args:
        trials: All of them, by number.
        total: How many shall get done.
    """

    trials: Sequence[FrozenTrial]
    total: int

    @classmethod
    def read(cls, study: optuna.Study, total: int) -> Ledger:
        return cls(study.get_trials(deepcopy=False), total)

    @property
    def done(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if is_done(trial) and trial.number in self._live]

    @cached_property
    def _live(self) -> frozenset[int]:
        """Numbers of the live trials."""
        live: set[int] = set()
        for trial in self.trials:
            if is_live(trial) and (len(live) < self.total or not is_given_up(trial)):
                live.add(trial.number)
        return frozenset(live)

    @property
    def running(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if trial.state == TrialState.RUNNING and not is_void(trial)]

    @property
    def is_complete(self) -> bool:
        return len(self.done) >= self.total

    @property
    def may_start(self) -> bool:
        """Whether asking for a trial makes sense: one waits in the queue, or there is room for a new one."""
        return len(self._live) < self.total or any(trial.state == TrialState.WAITING for trial in self.trials)

    def may_run(self, number: int) -> bool:
        """Whether the trial of that number, which is running, may go on."""
        before = [trial for trial in self.trials if trial.number < number and not is_void(trial)]
        item = next((_item(trial) for trial in self.trials if trial.number == number), None)
        taken = item is not None and any(_item(trial) == item for trial in before)
        return not taken and sum(trial.number in self._live for trial in before) < self.total

    def owed(self, starts: Mapping[str, Mapping[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Parameters and attributes of what should be in the queue and is not: interrupted trials and warm starts.

        Args:
            starts: Parameters of the warm starts by label, in the order in which they shall be tried.
        """
        queued = {_item(trial) for trial in self.trials if not is_void(trial)}
        missing = [_retry(trial) for trial in self.trials if is_interrupted(trial) and trial.number not in queued]
        first = list(starts.items())[: self.total]
        return missing + [(dict(params), {LABEL: label}) for label, params in first if label not in queued]


def is_void(trial: FrozenTrial) -> bool:
    return _VOID in trial.user_attrs


def is_done(trial: FrozenTrial) -> bool:
    if not trial.state.is_finished() or is_void(trial):
        return False
    return SCORES in trial.user_attrs or is_given_up(trial)


def is_given_up(trial: FrozenTrial) -> bool:
    """Died with its process every time it was tried."""
    tried = trial.user_attrs.get(_RETRIES, 0)
    return trial.state == TrialState.FAIL and SCORES not in trial.user_attrs and tried >= MAX_RETRIES


def is_interrupted(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and not is_void(trial) and not is_done(trial)


def is_live(trial: FrozenTrial) -> bool:
    return not is_void(trial) and (is_done(trial) or not trial.state.is_finished())


def void(study: optuna.Study, trial_id: int) -> None:
    """Give a running trial up for good, as one that never was."""
    storage = study._storage
    try:
        storage.set_trial_user_attr(trial_id, _VOID, True)
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        pass  # somebody took it for dead: it is queued again, and voided then


def interrupt(study: optuna.Study, trial_id: int) -> bool:
    """Fail a trial so that it is tried again; False when somebody else has ended it."""
    try:
        study._storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


def _item(trial: FrozenTrial) -> int | str | None:
    """What a queued trial stands for: the number of the trial that it retries, or the label of a warm start."""
    retried: int | None = trial.user_attrs.get(_RETRY_OF)
    return trial.user_attrs.get(LABEL) if retried is None else retried


def _retry(trial: FrozenTrial) -> tuple[dict[str, Any], dict[str, Any]]:
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    label = {LABEL: trial.user_attrs[LABEL]} if LABEL in trial.user_attrs else {}
    return params, {**label, _RETRY_OF: trial.number, _RETRIES: trial.user_attrs.get(_RETRIES, 0) + 1}
