"""Search: try policies under a memory target, confirm the best on fresh prompts, and ship the winner."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError

from kvplan.errors import StudyError
from kvplan.model_spec import ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.schema import LayerPolicy, Policy, Target
from kvplan.search.budget import Protection
from kvplan.search.claims import LABEL, OUT_OF_MEMORY, SCORES, SHARE, Ledger, is_given_up
from kvplan.search.compile import Params
from kvplan.search.confirm import SEARCHED, Score, SearchResult, TrialRow, confirm, state, try_score
from kvplan.search.decisions import Decisions
from kvplan.search.decisions import decisions as default_decisions
from kvplan.search.definition import Definition, MeasuredProfile
from kvplan.search.heartbeat import Owner
from kvplan.search.layer_groups import Groups
from kvplan.search.objective import Judge
from kvplan.search.samplers import make_sampler
from kvplan.search.shared import SharedStudy
from kvplan.search.storage import open_storage
from kvplan.stats import PromptScores

if TYPE_CHECKING:
    from kvplan.calibrate.profile import Profile

FAIL = optuna.trial.TrialState.FAIL
STALE_AFTER = 180.0
WAIT_SECONDS = 1.0  # between looks while others run the last trials


def search(
    profile: Profile,
    spec: ModelSpec,
    target: Target,
    score: Score,
    *,
    search_prompts: Sequence[int],
    confirm_prompts: Sequence[int],
    trials: int = 60,
    timeout: float | None = None,
    seed: int = 0,
    storage: Path | str | None = None,
    study: str | None = None,
    stale_after: float = STALE_AFTER,
    on_best: Callable[[Policy], None] = lambda policy: None,
    on_trial: Callable[[TrialRow, TrialRow, int], None] = lambda row, best, done: None,
    on_confirm: Callable[[int, int], None] = lambda done, total: None,
    prepare: Callable[[Sequence[int]], None] = lambda prompts: None,
    say: Callable[[str], None] = lambda line: None,
    evictors: Sequence[str] = (),
    codecs: Sequence[str] | None = None,
    groups: Groups = None,
    decisions: Decisions | None = None,
    judge: Judge = Judge(),
    sampler: str = "auto",
    shares: Sequence[int] = (),
    protection: Protection = Protection(),
    identity: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Find the policy with the smallest loss under a memory target: the mean KL, unless `judge` says otherwise.

    There is no pruning: a trial replays a few dozen prompts, and a rank test on part of them would drop the policies
    that lose a little on most prompts and win much on a few.

    Args:
        profile: What was measured; must be of the same model.
        spec: The model.
        target: What the policy may hold.
        score: Scores a policy on prompts, by index.
        search_prompts: What the trials are scored on.
        confirm_prompts: What the winner is chosen on; the trials never see them.
        trials: Trials of the study in all, those of earlier runs and of other processes included. 0: ship the
            knapsack's answer, scored.
        timeout: Seconds after which no further trial starts; there is always one.
        seed: Of the sampler.
        storage: Where a search that can be killed, resumed and joined is kept: the path of a journal (one host), the
            URL of a PostgreSQL server, or None.
        study: Its name there; by default one that follows from the inputs. A file holds one study, whatever its name.
        stale_after: Seconds without a sign of life after which a trial of another host is tried again.
        on_best: Called with every policy that is better than all before, with its scores stated, and with the winner.
        on_trial: Called after each trial with its row, the best row so far and the number of trials so far.
        on_confirm: Called with the candidates confirmed so far, from 0 on, and their number.
        prepare: Called with prompts right before policies are scored on them for the first time.
        say: Told what a person may want to know: dead workers, lost connections.
        evictors: Names to choose from; by default all that the profile measured.
        codecs: Codecs to choose from beside plain slots, likewise; none with `("dense",)`.
        groups: Layers that are decided together, or how many groups; by default those of alike sensitivity.
        decisions: What is searched; by default what so many trials can explore.
        judge: The objective, and the tasks of the prompts when it has floors.
        sampler: Name in `samplers.NAMES`.
        shares: Memory targets in basis points, ascending, the target's own the last: search them all at once, for the
            best loss at each.
        protection: What every layer keeps.
        identity: What else decides a score, for example the fingerprint of the prompts.
        provenance: Goes into the policies.
        inputs: How model and prompts were loaded, for workers that join.

    Raises:
        TargetError: the target cannot be met; nothing was run.
        ProfileError: the profile lacks what the search needs.
        StudyError: the storage cannot be used, or no trial gave a score.
    """
    definition = Definition(
        profile=MeasuredProfile.of(profile),
        target=target,
        protection=protection,
        evictors=tuple(evictors),
        codecs=None if codecs is None else tuple(codecs),
        groups=groups if groups is None or isinstance(groups, int) else tuple(map(tuple, groups)),
        decisions=decisions or default_decisions(trials),
        objective=judge.objective,
        sampler=sampler,
        search_prompts=tuple(search_prompts),
        seed=seed,
        stale_after=stale_after,
        shares=tuple(shares),
        inputs=dict(inputs or {}),
    )
    run = TrialRun(definition, spec, score, judge, dict(provenance or {}))
    compiler, context = run.compiler, run.compiler.budget.context_tokens
    starts = run.space.warm_starts()
    if trials == 0:
        solved = run.space.solved() if shares else starts[:1]
        rows = [
            TrialRow(number, start.label, start.params, compiler.compile(start.params, run.provenance), None)
            for number, start in enumerate(solved)
        ]
        prepare(confirm_prompts)
        result = confirm(rows, [], score, confirm_prompts, context, seed, spec, on_confirm, judge)
        on_best(result.policy)
        return result
    known = {**(identity or {}), **run.identity}
    deadline = math.inf if timeout is None else time.monotonic() + timeout

    def report(rows: Sequence[TrialRow], is_better: bool) -> None:
        if run.best is not None and is_better:
            on_best(state(run.best.policy, run.best, context, seed, spec))
        for row in rows:
            on_trial(row, run.best or row, len(run.rows))

    with quiet(), open_storage(storage, say) as opened:
        shared = SharedStudy.create(opened, study, definition, known, trials, run.starts)
        report([], run.take_over(shared.ledger()))
        resumed, already_done = len(run.rows), run.num_done
        if run.num_done < trials:
            prepare(search_prompts)
        run.work(shared, trials, deadline, report, say)
    if run.best is None:
        lacked = sum(row.out_of_memory for row in run.rows)
        why = f"{lacked} ran out of memory, and the others were nan" if lacked else "and all were nan"
        raise StudyError(f"no trial gave a score: {len(run.rows)} were tried, {why}")
    recipes = [start.label for start in starts if start.is_recipe]
    prepare(confirm_prompts)
    result = confirm(run.rows, recipes, score, confirm_prompts, context, seed, spec, on_confirm, judge)
    on_best(result.policy)
    return replace(result, resumed=resumed, by_others=max(run.num_done - already_done - run.num_own, 0))


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
