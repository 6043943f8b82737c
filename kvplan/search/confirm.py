"""Confirmation: the winner is chosen on prompts that the trials did not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvplan.errors import StudyError, is_out_of_memory
from kvplan.model_spec import ModelSpec
from kvplan.policy.memory import BytesPlan, plan
from kvplan.policy.schema import Policy
from kvplan.search.compile import Params
from kvplan.search.objective import Judge, Objective
from kvplan.stats import Interval, PromptScores, bootstrap

Score = Callable[[Policy, list[int]], PromptScores]
Rank = tuple[float, float]  # of policies, best first: what is missing to the floors, and the loss
FINALISTS = 6
SEARCHED = "search"  # the label of a trial that the sampler chose
NO_TRIAL = -1  # the number of a plan that no trial made


@dataclass(frozen=True)
class TrialRow:
    """One trial. `scores` are on the search prompts, or None when it was not scored on them; `rank` is theirs.

    Out of memory: it could not be scored, so its scores are nan.
    """

    number: int
    label: str
    params: Params
    policy: Policy
    scores: PromptScores | None
    rank: Rank = (0.0, math.nan)
    out_of_memory: bool = False

    @property
    def kl(self) -> float:
        return math.nan if self.scores is None else self.scores.mean_kl

    @property
    def is_valid(self) -> bool:
        """False for a trial whose score is nan or infinite: it counts as a trial, and cannot win."""
        return all(map(math.isfinite, self.rank))


@dataclass(frozen=True)
class Finalist:
    """A trial's policy on the confirmation prompts."""

    trial: TrialRow
    scores: PromptScores
    interval: Interval
    rank: Rank

    @property
    def kl(self) -> float:
        return self.scores.mean_kl


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        policy: The winner, stating its target, planned bytes and score.
        winner: The winner's trial and confirmation scores.
        finalists: All that were confirmed, best first; the winner is the first.
        trials: All trials, in order, those of resumed runs included.
        recipe: The best recipe from the literature, confirmed too; None when none was scored.
        gain: KL of the recipe minus the winner's, paired by prompt: above 0 the search was worth it.
        front: Of a search over several memory targets: the finalists that no other one beats in bytes and rank, the
            fewest bytes first; else the winner alone.
        bytes: What the policy holds at one prompt of `context_tokens`.
        context_tokens: Prompt length of `bytes`.
        goal: What made the winner the best.
        resumed: How many of the trials an earlier run made.
        by_others: How many of the others another process made.
    """

    policy: Policy
    winner: Finalist
    finalists: tuple[Finalist, ...]
    trials: tuple[TrialRow, ...]
    recipe: Finalist | None
    gain: Interval | None
    front: tuple[Finalist, ...]
    bytes: BytesPlan
    context_tokens: int
    goal: str = Objective().goal
    resumed: int = 0
    by_others: int = 0

    @property
    def num_failed(self) -> int:
        return sum(row.scores is not None and not row.is_valid for row in self.trials)

    @property
    def num_out_of_memory(self) -> int:
        """How many of the failed ones could not be scored at all."""
        return sum(row.out_of_memory for row in self.trials)


def confirm(
    rows: Sequence[TrialRow],
    recipes: Sequence[str],
    score: Score,
    prompts: Sequence[int],
    context_tokens: int,
    seed: int,
    spec: ModelSpec,
    on_confirm: Callable[[int, int], None] = lambda done, total: None,
    judge: Judge = Judge(),
) -> SearchResult:
    """Score the best distinct policies and the best recipe on `prompts`; the best rank there wins.

    `on_confirm` is called with the candidates scored so far, from 0 on, and their number.

    Raises:
        StudyError: no candidate gave a score.
    """
    chosen = finalists(rows, recipes)
    entries = []
    on_confirm(0, len(chosen))
    for done, row in enumerate(chosen, 1):
        scores, _ = try_score(score, row.policy, list(prompts))
        rank = judge.rank(scores, prompts)
        if all(map(math.isfinite, rank)):
            entries.append(Finalist(row, scores, bootstrap(scores.kl, seed=seed), rank))
        on_confirm(done, len(chosen))
    if not entries:
        raise StudyError("no candidate gave a score on the confirmation prompts: all were nan or out of memory")
    entries.sort(key=lambda f: f.rank)
    winner = entries[0]
    recipe = min((f for f in entries if f.trial.label in recipes), key=lambda f: f.rank, default=None)
    gain = None
    if recipe is not None:
        pairs = zip(recipe.scores.kl, winner.scores.kl, strict=True)
        gain = bootstrap([a - b for a, b in pairs], seed=seed)
    return SearchResult(
        policy=state(winner.trial.policy, winner, context_tokens, seed, spec),
        winner=winner,
        finalists=tuple(entries),
        trials=tuple(row for row in rows if row.scores is not None),
        recipe=recipe,
        gain=gain,
        front=_front(entries, lambda policy: plan(policy, spec, [context_tokens]).total),
        bytes=plan(winner.trial.policy, spec, [context_tokens]),
        context_tokens=context_tokens,
        goal=judge.objective.goal,
    )


def try_score(score: Score, policy: Policy, prompts: list[int]) -> tuple[PromptScores, bool]:
    """The scores, and whether memory ran out instead: then they are nan."""
    try:
        return score(policy, prompts), False
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler: there the traceback still holds the tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    none = (math.nan,) * len(prompts)
    return PromptScores(kl=none, top1=none, task=none, nll=none), True


def _front(finalists: Sequence[Finalist], held: Callable[[Policy], int]) -> tuple[Finalist, ...]:
    if all(finalist.trial.params.share is None for finalist in finalists):
        return tuple(finalists[:1])
    kept: list[Finalist] = []
    for finalist in sorted(finalists, key=lambda f: (held(f.trial.policy), f.rank)):
        if not kept or finalist.rank < kept[-1].rank:
            kept.append(finalist)
    return tuple(kept)


def hold_out(tasks: Sequence[str]) -> tuple[list[int], list[int]]:
    """Two thirds of the prompts for the trials and a third for the confirmation, every task in the same proportion.

    Args:
        tasks: The task of each prompt.
    """
    by_task = sorted(range(len(tasks)), key=lambda i: (tasks[i], i))
    held = set(by_task[2::3])
    return [i for i in range(len(tasks)) if i not in held], sorted(held)


def finalists(rows: Sequence[TrialRow], recipes: Sequence[str]) -> list[TrialRow]:
    """The best distinct policies, and the best recipe whatever its rank."""
    if all(row.scores is None for row in rows):
        return list({row.policy.layers: row for row in reversed(rows)}.values())[::-1]
    ranked = sorted((row for row in rows if row.is_valid), key=lambda row: (row.rank, row.number))
    distinct = list({row.policy.layers: row for row in reversed(ranked)}.values())[::-1]
    best_recipe = [row for row in ranked if row.label in recipes][:1]
    first = list({row.params.share: row for row in reversed(distinct)}.values())[::-1]  # the best at each target
    first += [row for row in distinct if row not in first][: max(0, FINALISTS - len(first))]
    held = {row.policy.layers: k for k, row in enumerate(first)}
    for row in best_recipe:
        if row.policy.layers in held:
            first[held[row.policy.layers]] = row  # the same policy: let it go by the recipe's name
        else:
            first.append(row)
    return first


def state(policy: Policy, scored: TrialRow | Finalist, context_tokens: int, seed: int, spec: ModelSpec) -> Policy:
    """The policy with its planned bytes and its score in the provenance."""
    row, stage = (scored, "search") if isinstance(scored, TrialRow) else (scored.trial, "confirmation")
    scores = scored.scores
    assert scores is not None
    interval = bootstrap(scores.kl, seed=seed)
    bounds = interval.bounds(len(scores))
    held = plan(policy, spec, [context_tokens])
    search: dict[str, Any] = {
        **({} if row.number == NO_TRIAL else {"trial": row.number}),
        "label": row.label,
        "prompts": stage,
        "num_prompts": len(scores),
        "kl": _rounded(interval.mean),
        **({} if bounds is None else {"kl_95": [_rounded(bound) for bound in bounds]}),
        "top1": _rounded(scores.mean_top1),
    }
    if scores.mean_task is not None:
        search["task"] = _rounded(scores.mean_task)
    planned = {"prompt_tokens": context_tokens, "bytes": held.total, "full_bytes": held.full}
    return replace(policy, provenance={**policy.provenance, "planned": planned, "search": search})


def _rounded(value: float) -> float:
    """Six significant digits: what a score is worth, and what a reader can read."""
    return float(f"{value:.6g}")
