"""slowdown(): how much slower a policy decodes than transformers' full cache, round by round in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvplan.check.cost import decode_seconds, dynamic_cache, prefilled
from kvplan.check.gate import ALPHA, RATIO, Finding, State
from kvplan.check.timing import in_turn
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import Policy
from kvplan.runtime.attach import attach, full_policy
from kvplan.runtime.replay import capture

ROUNDS = 11
NEW_TOKENS = 32
_FULL, _POLICY = "full", "policy"


@torch.no_grad()
def slowdown(
    model: Any,
    spec: ModelSpec,
    policy: Policy,
    prompt_ids: Sequence[int],
    *,
    rounds: int = ROUNDS,
    new_tokens: int = NEW_TOKENS,
    progress: Callable[[], None] = lambda: None,
) -> list[float]:
    """Seconds under the policy over seconds on transformers' own cache, one ratio a round; a first round warms up."""
    ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
    prompt = capture(model, full_policy(model), spec, ids, torch.ones_like(ids, dtype=torch.bool))

    def under() -> float:
        with attach(model, policy, spec) as runtime:
            return decode_seconds(model, prefilled(runtime, prompt, ids), ids, new_tokens)

    def plain() -> float:
        return decode_seconds(model, dynamic_cache(model, prompt, ids.shape[1]), ids, new_tokens)

    times = in_turn({_FULL: plain, _POLICY: under}, rounds, progress)
    return [slow / fast for slow, fast in zip(times[_POLICY], times[_FULL], strict=True)]


def judge_slowdown(ratios: Sequence[float], limit: float) -> Finding:
    """The median ratio against a limit.

    The interval is between two of the ordered ratios, so it assumes nothing about how times are distributed: the
    median lies below the k-th smallest of n as often as a fair coin shows heads fewer than k times in n.
    """
    ordered = sorted(ratios)
    k = _rank(len(ordered))
    low, high = ordered[k], ordered[-1 - k]
    state = State.REGRESSION if low > limit else State.PASS if high <= limit else State.INCONCLUSIVE
    return Finding(
        name="slowdown",
        state=state,
        prompts=0,
        value=ordered[len(ordered) // 2],
        low=low,
        high=high,
        limit=limit,
        unit=RATIO,
    )


def _rank(n: int) -> int:
    """How many ordered values lie outside the interval at each end, at one-sided ALPHA."""
    from scipy.special import bdtr

    return max((k for k in range(n // 2) if bdtr(k, n, 0.5) <= ALPHA), default=0)
