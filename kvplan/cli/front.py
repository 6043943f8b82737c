"""`kvplan search --pareto`: the memories that are searched, and what is kept and told of the front."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplan.cli.console import MAX_TOKENS

if TYPE_CHECKING:
    from kvplan.check.results import Cost
    from kvplan.check.step_costs import StepCosts
    from kvplan.model_spec import ModelSpec
    from kvplan.policy.schema import Target
    from kvplan.search.confirm import SearchResult

COST_TOKENS, COST_ROUNDS = 24, 3
STEP_TOKENS, STEP_ROUNDS = 12, 2


@dataclass(frozen=True)
class TimedFront:
    """A front with what its plans cost in time.

    Attributes:
        costs: Measured side by side, by trial.
        steps: What predicts the others; None after a prompt without room.
        points: As the front's file holds them.
        predicted: Speeds of all trials over the full cache, by trial; empty without `steps`.
    """

    costs: Mapping[int, Cost]
    steps: StepCosts | None
    points: Any
    predicted: Any


def time_and_keep(
    path: Path, network: object, spec: ModelSpec, prompt: Sequence[int], result: SearchResult, seed: int
) -> TimedFront:
    """Time the front's plans on one prompt, and write them."""
    from kvplan.files import write_text
    from kvplan.report.front import front_data, predictions

    steps = front_steps(network, spec, prompt, result)
    costs = front_costs(network, spec, prompt, result)
    data = front_data(result, spec, costs, seed, steps)
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return TimedFront(costs, steps, data["points"], None if steps is None else predictions(result, spec, steps))


def front_path(output: Path) -> Path:
    """Where --pareto keeps its front: beside the policy."""
    return output.with_name(f"{output.stem}.front.json")


def front_shares(target: Target, compiled: Callable[[Target], object]) -> tuple[int, ...]:
    """The memory targets of --pareto.

    Raises:
        TargetError: the target is no share.
    """
    from kvplan.errors import TargetError
    from kvplan.search.front import feasible_shares

    if target.share is None:
        raise TargetError("--pareto needs a target in percent, like --mem 80%")
    return feasible_shares(target.share, compiled)


def front_costs(network: object, spec: ModelSpec, prompt: Sequence[int], result: SearchResult) -> dict[int, Cost]:
    """Decode speed of the front's plans, measured side by side on one prompt; by trial."""
    from kvplan.check.cost import costs
    from kvplan.cli.console import progress

    policies = {str(f.trial.number): f.trial.policy for f in result.front}
    steps = len(policies) + (len(policies) + 1) * (COST_ROUNDS + 1)
    tokens = min(COST_TOKENS, room_after(prompt, spec))
    with progress("timing the front", steps) as advance:
        found = costs(network, spec, policies, prompt, new_tokens=tokens, repeats=COST_ROUNDS, progress=advance)
    return {int(number): cost for number, cost in found.items()}


def front_steps(network: object, spec: ModelSpec, prompt: Sequence[int], result: SearchResult) -> StepCosts | None:
    """What predicts the decode speed of all trials, from what their layers do; None after a prompt without room."""
    from kvplan.check.step_probes import probes_for, step_costs
    from kvplan.cli.console import progress

    tokens = min(STEP_TOKENS, room_after(prompt, spec))
    if not tokens:
        return None
    probes = probes_for([row.policy for row in (*result.trials, *(f.trial for f in result.front))], spec, len(prompt))
    steps = (sum(len(probe.policies) for probe in probes) + 1) * (STEP_ROUNDS + 1)
    with progress("timing steps", steps) as advance:
        return step_costs(network, spec, probes, prompt, new_tokens=tokens, repeats=STEP_ROUNDS, progress=advance)


def room_after(prompt: Sequence[int], spec: ModelSpec) -> int:
    """Tokens that the model has positions for after a prompt."""
    return max(0, (spec.max_context_tokens or MAX_TOKENS) - len(prompt))
