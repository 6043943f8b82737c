"""Search: try policies under a memory target, confirm the best on fresh prompts, and ship the winner."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplan.errors import StudyError
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import Policy, Target
from kvplan.search.budget import Protection
from kvplan.search.confirm import Score, SearchResult, TrialRow, confirm, state
from kvplan.search.decisions import Decisions
from kvplan.search.decisions import decisions as default_decisions
from kvplan.search.definition import Definition, MeasuredProfile
from kvplan.search.layer_groups import Groups
from kvplan.search.objective import Judge
from kvplan.search.shared import SharedStudy
from kvplan.search.storage import open_storage
from kvplan.search.trial_run import TrialRun, quiet

if TYPE_CHECKING:
    from kvplan.calibrate.profile import Profile

STALE_AFTER = 180.0


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
    on_resume: Callable[[Sequence[TrialRow]], None] = lambda rows: None,
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
        on_resume: Called once before all trials with the rows of earlier runs, where there are some.
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
        if run.rows:
            on_resume(tuple(run.rows))
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
