"""Work: a process that adds trials to a study which `kvplan search` has created."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvplan.model_spec import ModelSpec
from kvplan.search.confirm import Score, TrialRow
from kvplan.search.objective import Judge
from kvplan.search.shared import SharedStudy
from kvplan.search.trial_run import TrialRun, quiet

HINTS = {
    "kvplan": "install the same version",
    "model": "give its --model",
    "dtype": "the model's dtype is another here",
    "data": "give its --data",
}


@dataclass(frozen=True)
class Worked:
    """What a worker did.

    Attributes:
        own: Trials that it ran to the end.
        done: Trials of the study that are done.
        total: Trials of the study in all.
    """

    own: int
    done: int
    total: int


def work(
    shared: SharedStudy,
    spec: ModelSpec,
    score: Score,
    *,
    identity: Mapping[str, Any] | None = None,
    tasks: Sequence[str] = (),
    timeout: float | None = None,
    on_trial: Callable[[TrialRow, TrialRow, int], None] = lambda row, best, done: None,
    prepare: Callable[[Sequence[int]], None] = lambda prompts: None,
    say: Callable[[str], None] = lambda line: None,
) -> Worked:
    """Run trials of a study until it has all of them, and leave the choice of the winner to `search`.

    Args:
        shared: The study, as `SharedStudy.join` opens it.
        spec: The model.
        score: Scores a policy on prompts, by index.
        identity: What else decides a score; as `search` was told.
        tasks: Of every prompt, by index, where the objective has floors.
        timeout: Seconds after which no further trial starts.
        on_trial: Called after each trial, of whatever process, with its row, the best row and the trials done.
        prepare: Called with the prompts before the first trial.
        say: Told of dead workers.

    Raises:
        StudyError: model, data or version are not the study's, by name; or the storage fails.
    """
    definition = shared.definition
    shared.refuse_other({**(identity or {}), "model": spec.fingerprint}, HINTS)
    run = TrialRun(definition, spec, score, Judge(definition.objective, tasks), {})
    shared.refuse_other(run.identity, HINTS)
    deadline = math.inf if timeout is None else time.monotonic() + timeout

    def report(rows: Sequence[TrialRow], is_better: bool) -> None:
        for row in rows:
            on_trial(row, run.best or row, run.num_done)

    with quiet():
        run.take_over(shared.ledger())
        if run.num_done < shared.total:
            prepare(definition.search_prompts)
            run.work(shared, None, deadline, report, say)
        return Worked(run.num_own, run.num_done, shared.total)
