"""answer(): a policy for another memory target, out of the trials that a study has made already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvplan.errors import StudyError
from kvplan.model_spec import ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.schema import Target
from kvplan.search.confirm import NO_TRIAL, Finalist, Score, SearchResult, TrialRow, confirm
from kvplan.search.objective import Judge
from kvplan.search.shared import SharedStudy
from kvplan.search.trial_run import TrialRun, quiet
from kvplan.stats import Interval, bootstrap

CANDIDATES = 6


@dataclass(frozen=True)
class Answer:
    """A policy for a target that was not searched, and how far off it may be.

    Attributes:
        result: The candidates on the confirmation prompts; the winner is the policy.
        roomier: The study's best plan that holds more bytes, on the same prompts; None when the study has none.
        gap: KL of the winner minus that of `roomier`, paired by prompt: what a search at this target could still gain,
            as far as more bytes never hurt. None without `roomier`: then up to the winner's whole KL.
    """

    result: SearchResult
    roomier: Finalist | None
    gap: Interval | None


def answer(
    shared: SharedStudy,
    spec: ModelSpec,
    target: Target,
    score: Score,
    confirm_prompts: Sequence[int],
    *,
    tasks: Sequence[str] = (),
    seed: int = 0,
    on_confirm: Callable[[int, int], None] = lambda done, total: None,
    provenance: Mapping[str, Any] | None = None,
) -> Answer:
    """Project the study's best plans on another target, and choose among them and the knapsack's answer.

    No trial is run: the candidates are only scored on the confirmation prompts.

    Args:
        shared: The study.
        spec: The model, of the study's fingerprint.
        target: What the policy may hold.
        score: Scores a policy on prompts, by index.
        confirm_prompts: What the winner is chosen on.
        tasks: Of every prompt, by index, where the objective has floors.
        seed: Of the bootstrap.
        on_confirm: Called with the candidates scored so far, from 0 on, and their number.
        provenance: Goes into the policy.

    Raises:
        StudyError: the study has no scored trial.
        TargetError: the target cannot be met; nothing was run.
    """
    definition = shared.definition
    judge = Judge(definition.objective, tasks)
    with quiet():
        run = TrialRun(definition, spec, score, judge, {})
        run.take_over(shared.ledger())
    if run.best is None:
        raise StudyError(f"study '{shared.name}' has no scored trial to answer from")
    groups = tuple(map(tuple, run.compiler.groups))
    compiler, space = replace(definition, target=target, shares=(), groups=groups).space(spec)
    budget = compiler.budget
    context, stated = budget.context_tokens, dict(provenance or {})
    allowed = budget.row_bytes
    valid = [row for row in run.rows if row.is_valid]
    ranked = sorted(valid, key=lambda row: (_distance(row, allowed, spec, context), row.rank))
    params = {NO_TRIAL: ("knapsack", space.warm_starts()[0].params)}
    params |= {row.number: (row.label, replace(row.params, share=None)) for row in ranked[:CANDIDATES]}
    rows = [
        TrialRow(number, label, point, compiler.compile(point, stated), None)
        for number, (label, point) in params.items()
    ]
    result = confirm(rows, [], score, confirm_prompts, context, seed, spec, on_confirm, judge)
    above = [row for row in ranked if plan(row.policy, spec, [context]).total > allowed]
    if not above:
        return Answer(result, None, None)
    best = min(above, key=lambda row: row.rank)
    scores = score(best.policy, list(confirm_prompts))
    roomier = Finalist(best, scores, bootstrap(scores.kl, seed=seed), judge.rank(scores, confirm_prompts))
    gap = bootstrap([a - b for a, b in zip(result.winner.scores.kl, scores.kl, strict=True)], seed=seed)
    return Answer(result, roomier, gap)


def _distance(row: TrialRow, allowed: int, spec: ModelSpec, context: int) -> int:
    """0 for the plans of the nearest memory, 1 for the next ...; those of one search are all as near."""
    if row.params.share is None:
        return 0
    return abs(plan(row.policy, spec, [context]).total - allowed) // max(allowed // 5, 1)
