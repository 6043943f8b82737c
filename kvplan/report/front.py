"""A front: the best plan at each memory, as a table and as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from kvplan.check.results import Cost
from kvplan.check.step_costs import StepCosts
from kvplan.model_spec import ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.serialize import dump_policy
from kvplan.report.search import name
from kvplan.report.tables import interval, number_table
from kvplan.search.confirm import Finalist, SearchResult, state
from kvplan.search.front_file import FORMAT, KEY
from kvplan.units import format_share

NAME_WIDTH = 22


def front_table(
    result: SearchResult, spec: ModelSpec, costs: Mapping[int, Cost], steps: StepCosts | None = None
) -> Table:
    """The fewest bytes first, on the confirmation prompts; decode speeds as measured, and as `steps` predicts them.

    Fits 80 columns.
    """
    rows = []
    for finalist in result.front:
        held = plan(finalist.trial.policy, spec, [result.context_tokens])
        task = finalist.scores.mean_task
        cost = costs.get(finalist.trial.number)
        speed = "-" if cost is None or cost.speedup is None else f"{cost.speedup[0]:.2f}x"
        rows.append(
            [
                name(finalist.trial, NAME_WIDTH),
                f"{held.ratio:.1%}",
                f"{finalist.kl:.4f}",
                interval(finalist.interval, len(finalist.scores)),
                "-" if task is None else f"{task:.1%}",
                speed,
                "-" if steps is None else f"{steps.speedup(finalist.trial.policy, spec):.2f}x",
            ]
        )
    headers = ("plan", "of full", "KL", "95 %", "exact", "decode", "predicted")
    return number_table(headers, rows, f"the front, at a prompt of {result.context_tokens} tokens", gap=1)


def front_notes(costs: Mapping[int, Cost], steps: StepCosts | None = None) -> list[str]:
    """What the columns mean that the summary of the finalists does not have, a line each."""
    told = ["of full: bytes held, of a full cache's. exact: answers that are wholly right."]
    if any(cost.speedup for cost in costs.values()):
        told.append("decode: tokens a second, of those with transformers' full cache (1x).")
    if steps is not None:
        told.append("predicted: the same, from what each layer's step was measured to cost.")
    return told


def front_data(
    result: SearchResult, spec: ModelSpec, costs: Mapping[int, Cost], seed: int, steps: StepCosts | None = None
) -> dict[str, Any]:
    """For the front's file: every plan whole, with its scores, and the table that predicts decode speeds."""
    return {
        KEY: FORMAT,
        "model": dict(spec.policy_block()),
        "prompt_tokens": result.context_tokens,
        "step_costs": None if steps is None else steps.as_data(),
        "points": [_point(finalist, result.context_tokens, spec, costs, seed, steps) for finalist in result.front],
    }


def predictions(result: SearchResult, spec: ModelSpec, steps: StepCosts) -> dict[int, float]:
    """Decode speed over transformers' full cache that is predicted for every trial, by its number."""
    return {row.number: steps.speedup(row.policy, spec) for row in result.trials}


def _point(
    finalist: Finalist, context: int, spec: ModelSpec, costs: Mapping[int, Cost], seed: int, steps: StepCosts | None
) -> dict[str, Any]:
    policy = state(finalist.trial.policy, finalist, context, seed, spec)
    held, cost = plan(policy, spec, [context]), costs.get(finalist.trial.number)
    return {
        "target": format_share(finalist.trial.params.share or 0),
        "trial": finalist.trial.number,
        "label": name(finalist.trial),
        "bytes": held.total,
        "full_bytes": held.full,
        "kl": finalist.kl,
        "kl_95": finalist.interval.bounds(len(finalist.scores)),
        "top1": finalist.scores.mean_top1,
        "task": finalist.scores.mean_task,
        "tokens_per_second": None if cost is None else cost.tokens_per_second,
        "speedup": None if cost is None else cost.speedup,
        "predicted_speedup": None if steps is None else steps.speedup(policy, spec),
        "policy": dump_policy(policy),
    }
