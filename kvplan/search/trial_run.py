"""One process's part in a study: claim a trial, score it, tell the storage; take over what others did."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError

from kvplan.model_spec import ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.schema import LayerPolicy, Policy
from kvplan.search.claims import LABEL, OUT_OF_MEMORY, SCORES, SHARE, Ledger, is_given_up
from kvplan.search.compile import Params
from kvplan.search.confirm import SEARCHED, Score, TrialRow, try_score
from kvplan.search.definition import Definition
from kvplan.search.heartbeat import Owner
from kvplan.search.objective import Judge
from kvplan.search.samplers import make_sampler
from kvplan.search.shared import SharedStudy
from kvplan.stats import PromptScores

FAIL = optuna.trial.TrialState.FAIL
WAIT_SECONDS = 1.0  # between looks while others run the last trials


class TrialRun:
    """One process's part in a study: the trials of all processes so far, and what has been scored already.

    Args:
        definition: Of the study.
        spec: The model.
        score: Scores a policy on prompts.
        judge: Ranks the scores.
        provenance: Goes into the policies.

    Raises:
        TargetError, ProfileError: as `Definition.space`.
    """

    def __init__(
        self, definition: Definition, spec: ModelSpec, score: Score, judge: Judge, provenance: dict[str, Any]
    ) -> None:
        self.compiler, self.space = definition.space(spec)
        self.starts = {start.label: self.space.flat(start.params) for start in self.space.warm_starts()}
        self.identity = definition.identity(spec, self.compiler, self.space)
        self.score, self.prompts = score, list(definition.search_prompts)
        self._spec, self._is_front = spec, bool(definition.shares)
        self.provenance, self.judge = provenance, judge
        self.rows: list[TrialRow] = []
        self.best: TrialRow | None = None
        self.num_done = self.num_own = 0
        self._seen: set[int] = set()
        self._scored: dict[tuple[LayerPolicy, ...], PromptScores] = {}

    def work(
        self,
        shared: SharedStudy,
        trials: int | None,
        deadline: float,
        report: Callable[[Sequence[TrialRow], bool], None],
        say: Callable[[str], None],
    ) -> None:
        """Run trials until the study has `trials` of them (None: its own total), whoever runs them.

        Args:
            shared: The study.
            trials: When to stop.
            deadline: On `time.monotonic`, after which no trial starts; there is always one.
            report: Called with the rows that were done since the last call, and whether one is the best so far.
            say: Told of dead workers.
        """
        ledger = shared.ledger()
        shared.study.sampler = _sampler(shared, ledger)
        while True:
            known = len(self.rows)
            is_better = self.take_over(ledger)
            report(self.rows[known:], is_better)
            if shared.has_all(self.num_done) if trials is None else self.num_done >= trials:
                return
            if self.num_done and time.monotonic() >= deadline:
                return
            ledger, dead = shared.tidy(ledger, self.starts)
            for trial in dead:
                say(f"trial {trial.number}: {_fate(trial, ledger)}")
            if not ledger.may_start:
                time.sleep(min(WAIT_SECONDS, shared.definition.stale_after / 4))
            else:
                with _one_thread():
                    claimed = shared.claim()
                if claimed is not None:
                    self.trial(shared, claimed)
            ledger = shared.ledger()

    def take_over(self, ledger: Ledger) -> bool:
        """Take over the trials that got done since the last call; True when one is the best so far."""
        before = self.best
        for trial in ledger.done:
            if trial.number in self._seen:
                continue
            self._seen.add(trial.number)
            self.num_done += 1
            if is_given_up(trial):
                continue
            params = self.space.params(trial.params)
            policy = self.compiler.compile(params, self.provenance)
            label = trial.user_attrs.get(LABEL, SEARCHED)
            row = self._row(trial.number, label, params, policy, _unpack(trial.user_attrs[SCORES]))
            self._add(replace(row, out_of_memory=OUT_OF_MEMORY in trial.user_attrs))
        return self.best is not before

    def trial(self, shared: SharedStudy, trial: optuna.Trial) -> None:
        """Run a trial, from the sampler's choice to its score in the storage."""
        try:
            with shared.alive(trial):
                with _one_thread():
                    params = self.space.suggest(trial)
                policy = self.compiler.compile(params, self.provenance)
                scores, lacked = self._scored.get(policy.layers), False
                if scores is None:
                    scores, lacked = try_score(self.score, policy, self.prompts)
                if lacked:
                    trial.set_user_attr(OUT_OF_MEMORY, True)
                if math.isfinite(scores.mean_kl):
                    self._scored[policy.layers] = scores
                self._tell(shared.study, trial, policy, scores)
                self.num_own += 1
        except UpdateFinishedTrialError:
            return  # taken for dead: it is queued again, and its score is known here
        except BaseException:
            shared.release(trial)
            raise

    def _tell(self, study: optuna.Study, trial: optuna.Trial, policy: Policy, scores: PromptScores) -> None:
        """Raises: UpdateFinishedTrialError: another process has ended the trial."""
        held = plan(policy, self._spec, [self.compiler.budget.context_tokens]).ratio
        trial.set_user_attr(SHARE, held)
        trial.set_user_attr(SCORES, _pack(scores))
        rank = self.judge.rank(scores, self.prompts)
        if all(map(math.isfinite, rank)):
            for task, below in self.judge.shortfalls(scores, self.prompts).items():
                trial.set_constraint(f"floor.{task}", below)
            study.tell(trial, [rank[1], held] if self._is_front else rank[1], skip_if_finished=True)
        else:
            study.tell(trial, state=FAIL, skip_if_finished=True)

    def _row(self, number: int, label: str, params: Params, policy: Policy, scores: PromptScores) -> TrialRow:
        return TrialRow(number, label, params, policy, scores, self.judge.rank(scores, self.prompts))

    def _add(self, row: TrialRow) -> None:
        self.rows.append(row)
        if row.scores is not None and row.is_valid:
            self._scored[row.policy.layers] = row.scores
            if self.best is None or row.rank < self.best.rank:
                self.best = row


def _sampler(shared: SharedStudy, ledger: Ledger) -> optuna.samplers.BaseSampler:
    """One that does not draw again what another process draws at the same time."""
    who = f"/{Owner.here()}" if ledger.running else ""
    definition = shared.definition
    started = f"{len(ledger.trials)}{who}"
    return make_sampler(definition.sampler, shared.total, definition.seed, started, definition.num_objectives)


def _fate(trial: optuna.trial.FrozenTrial, ledger: Ledger) -> str:
    now = next(other for other in ledger.trials if other.number == trial.number)
    if is_given_up(now):
        return "its process died as those that tried it before; given up, and counted"
    return "its process died; it is tried again"


def _pack(scores: PromptScores) -> dict[str, list[float | None]]:
    """JSON knows no nan."""
    columns = {"kl": scores.kl, "top1": scores.top1, "task": scores.task, "nll": scores.nll}
    return {name: [x if math.isfinite(x) else None for x in values] for name, values in columns.items()}


def _unpack(data: Mapping[str, Sequence[float | None]]) -> PromptScores:
    columns = {name: tuple(math.nan if x is None else x for x in values) for name, values in data.items()}
    return PromptScores(kl=columns["kl"], top1=columns["top1"], task=columns["task"], nll=columns["nll"])


@contextmanager
def _one_thread() -> Iterator[None]:
    """A Gaussian process of a few dozen points is far slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's talk is not the user's business; it is as before afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (optuna.exceptions.ExperimentalWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(level)
