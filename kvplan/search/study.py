"""Search: try policies under a memory target, confirm the best on fresh prompts, and ship the winner."""

from __future__ import annotations

import hashlib
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

from kvplan.errors import StudyError
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Target
from kvplan.search.budget import Protection
from kvplan.search.compile import Compiler, Params, budget_for
from kvplan.search.confirm import SEARCHED, Score, SearchResult, TrialRow, confirm, state
from kvplan.search.decisions import Decisions
from kvplan.search.decisions import decisions as default_decisions
from kvplan.search.journal import INTERRUPTED, open_study
from kvplan.search.layer_groups import Groups
from kvplan.search.objective import Judge
from kvplan.search.samplers import make_sampler
from kvplan.search.space import SearchSpace, space_for
from kvplan.stats import PromptScores

if TYPE_CHECKING:
    from kvplan.calibrate.profile import Profile

COMPLETE, FAIL = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL


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
    storage: Path | None = None,
    on_best: Callable[[Policy], None] = lambda policy: None,
    on_trial: Callable[[TrialRow, TrialRow, int], None] = lambda row, best, done: None,
    on_confirm: Callable[[int, int], None] = lambda done, total: None,
    prepare: Callable[[Sequence[int]], None] = lambda prompts: None,
    evictors: Sequence[str] = (),
    codecs: Sequence[str] | None = None,
    groups: Groups = None,
    decisions: Decisions | None = None,
    judge: Judge = Judge(),
    sampler: str = "auto",
    protection: Protection = Protection(),
    identity: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
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
        trials: Trials of the study in all, those of earlier runs included. 0: ship the knapsack's answer, scored.
        timeout: Seconds after which no further trial starts; there is always one.
        seed: Of the sampler.
        storage: The journal of a search that can be killed and resumed, or None.
        on_best: Called with every policy that is better than all before, with its scores stated, and with the winner.
        on_trial: Called after each trial with its row, the best row so far and the number of trials so far.
        on_confirm: Called with the candidates confirmed so far, from 0 on, and their number.
        prepare: Called with prompts right before policies are scored on them for the first time.
        evictors: Names to choose from; by default all that the profile measured.
        codecs: Codecs to choose from beside plain slots, likewise; none with `("dense",)`.
        groups: Layers that are decided together, or how many groups; by default those of alike sensitivity.
        decisions: What is searched; by default what so many trials can explore.
        judge: The objective, and the tasks of the prompts when it has floors.
        sampler: Name in `samplers.NAMES`.
        protection: What every layer keeps.
        identity: What else decides a score, for example the fingerprint of the prompts.
        provenance: Goes into the policies.

    Raises:
        TargetError: the target cannot be met; nothing was run.
        ProfileError: the profile lacks what the search needs.
        StudyError: the storage cannot be used, or no trial gave a score.
    """
    budget = budget_for(profile, spec, target, protection)
    context = budget.context_tokens
    chosen = decisions or default_decisions(trials)
    compiler, space = space_for(profile, budget, chosen, evictors, groups, codecs)
    run = _Run(space, compiler, score, list(search_prompts), context, dict(provenance or {}), judge)
    starts = run.space.warm_starts()
    if trials == 0:
        policy = compiler.compile(starts[0].params, run.provenance)
        row = TrialRow(0, starts[0].label, starts[0].params, policy, None)
        prepare(confirm_prompts)
        result = confirm([row], [], score, confirm_prompts, context, seed, spec, on_confirm, judge)
        on_best(result.policy)
        return result
    known = {
        **(identity or {}),
        "model": spec.fingerprint,
        "target": [target.share, target.bytes, target.context_tokens, target.batch],
        "context": context,
        "protection": [protection.sink_tokens, protection.recent_tokens, protection.min_slots],
        "prompts": list(search_prompts),
        "profile": _digest([profile.sensitivity, profile.importance]),
        "space": run.space.describe(),
        "objective": judge.objective.describe(),
        "sampler": sampler,
    }
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    with _quiet(), open_study(storage, known, lambda started: make_sampler(sampler, trials, seed, started)) as study:
        resumed = run.replay(study)
        if run.best is not None:
            on_best(state(run.best.policy, run.best, context, seed, spec))
        labels = {trial.user_attrs.get("label") for trial in study.get_trials(deepcopy=False)}
        for start in starts:
            if start.label not in labels:
                study.enqueue_trial(run.space.flat(start.params), user_attrs={"label": start.label})
        if resumed < trials:
            prepare(search_prompts)
        for _ in range(resumed, trials):
            before = run.best
            row = run.trial(study)
            if run.best is not None and run.best is not before:
                on_best(state(run.best.policy, run.best, context, seed, spec))
            on_trial(row, run.best or row, len(run.rows))
            if time.monotonic() >= deadline:
                break
    if run.best is None:
        raise StudyError(f"no trial gave a score: {len(run.rows)} were tried, and all were nan")
    recipes = [start.label for start in starts if start.is_recipe]
    prepare(confirm_prompts)
    result = confirm(run.rows, recipes, score, confirm_prompts, context, seed, spec, on_confirm, judge)
    on_best(result.policy)
    return replace(result, resumed=resumed)


class _Run:
    """The state of one search: its trials so far, and what has been scored already."""

    def __init__(
        self,
        space: SearchSpace,
        compiler: Compiler,
        score: Score,
        prompts: list[int],
        context_tokens: int,
        provenance: dict[str, Any],
        judge: Judge,
    ) -> None:
        self.space, self.compiler, self.score, self.prompts = space, compiler, score, prompts
        self.provenance, self.judge = provenance, judge
        self.rows: list[TrialRow] = []
        self.best: TrialRow | None = None
        self._scored: dict[tuple[LayerPolicy, ...], PromptScores] = {}

    def replay(self, study: optuna.Study) -> int:
        """Take over the finished trials of an earlier run."""
        for trial in study.get_trials(states=(COMPLETE, FAIL)):
            if INTERRUPTED in trial.user_attrs or "scores" not in trial.user_attrs:
                continue
            params = self.space.params(trial.params)
            policy = self.compiler.compile(params, self.provenance)
            label = trial.user_attrs.get("label", SEARCHED)
            self._add(self._row(trial.number, label, params, policy, _unpack(trial.user_attrs["scores"])))
        return len(self.rows)

    def trial(self, study: optuna.Study) -> TrialRow:
        """One trial, from the sampler's choice to its score. If it raises, the trial is left to the next run."""
        with _one_thread():
            trial = study.ask()
            params = self.space.suggest(trial)
        policy = self.compiler.compile(params, self.provenance)
        scores = self._scored.get(policy.layers) or self.score(policy, self.prompts)
        trial.set_user_attr("scores", _pack(scores))
        row = self._row(trial.number, trial.user_attrs.get("label", SEARCHED), params, policy, scores)
        for task, below in self.judge.shortfalls(scores, self.prompts).items():
            trial.set_constraint(f"floor.{task}", below)
        if row.is_valid:
            study.tell(trial, row.rank[1])
        else:
            study.tell(trial, state=FAIL)
        self._add(row)
        return row

    def _row(self, number: int, label: str, params: Params, policy: Policy, scores: PromptScores) -> TrialRow:
        return TrialRow(number, label, params, policy, scores, self.judge.rank(scores, self.prompts))

    def _add(self, row: TrialRow) -> None:
        self.rows.append(row)
        if row.scores is not None and row.is_valid:
            self._scored[row.policy.layers] = row.scores
            if self.best is None or row.rank < self.best.rank:
                self.best = row


def _digest(data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


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
def _quiet() -> Iterator[None]:
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
