from __future__ import annotations

import math

import numpy as np
import pytest

from kvplan.check.gate import ALPHA, NATS, Criterion, Finding, State, judge, levels, looks, worst


def criterion(losses: object, limit: float = 0.05, lost: float = 1.0, **changes: float) -> Criterion:
    return Criterion(name="x", losses=tuple(losses), limit=limit, lost=lost, unit=NATS, **changes)  # type: ignore[arg-type]


def normal(mean: float, n: int = 250, sd: float = 0.05, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, sd, n)


def test_three_states() -> None:
    assert judge(criterion(normal(0.1)), ALPHA).state is State.REGRESSION
    assert judge(criterion(normal(0.0)), ALPHA).state is State.PASS
    assert judge(criterion(normal(0.05)), ALPHA).state is State.INCONCLUSIVE


def test_a_finding_tells_the_mean_and_its_interval() -> None:
    losses = normal(0.02)
    found = judge(criterion(losses), ALPHA)
    assert isinstance(found, Finding) and found.prompts == 250
    assert found.value == pytest.approx(losses.mean())
    # Student's t for 250 values and 5 % on each side, and the prompt that was not drawn.
    assert found.low == pytest.approx(losses.mean() - 1.651 * losses.std(ddof=1) / math.sqrt(250), abs=2e-4)
    assert found.high > losses.mean() + 1.651 * losses.std(ddof=1) / math.sqrt(250)


@pytest.mark.parametrize(("prompts", "state"), [(32, State.INCONCLUSIVE), (100, State.PASS)])
def test_prompts_without_any_loss_say_little_when_they_are_few(prompts: int, state: State) -> None:
    """The rule of three: none of 32 lost leaves room for one lost in twelve, which is more than 5 %."""
    assert judge(criterion([0.0] * prompts), ALPHA).state is state


@pytest.mark.parametrize(("prompts", "state"), [(2, State.INCONCLUSIVE), (6, State.REGRESSION)])
def test_two_lost_prompts_prove_nothing(prompts: int, state: State) -> None:
    assert judge(criterion([1.0] * prompts), ALPHA).state is state


def test_no_prompts_are_inconclusive() -> None:
    assert judge(criterion([]), ALPHA).state is State.INCONCLUSIVE


def test_many_criteria_share_the_rate_of_false_regressions() -> None:
    losses = normal(0.0575)
    assert judge(criterion(losses), ALPHA).state is State.REGRESSION
    assert judge(criterion(losses, share=0.1), ALPHA).state is State.INCONCLUSIVE


def test_the_worst_state_wins() -> None:
    assert worst([State.PASS, State.REGRESSION, State.INCONCLUSIVE]) is State.REGRESSION
    assert worst([State.PASS, State.INCONCLUSIVE]) is State.INCONCLUSIVE
    assert worst([State.PASS]) is worst([]) is State.PASS


def test_looks_double_and_end_with_all_prompts() -> None:
    assert looks(250) == [24, 48, 96, 250]
    assert looks(300) == [24, 48, 96, 192, 300]
    assert looks(30) == [30]
    assert looks(5) == [5]


@pytest.mark.parametrize("total", [5, 64, 250, 1000])
def test_the_looks_spend_the_error_rate_and_no_more(total: int) -> None:
    spent = levels(looks(total))
    assert sum(spent) == pytest.approx(ALPHA)
    assert all(level > 0 for level in spent) and spent == sorted(spent)


@pytest.mark.parametrize("kind", ["normal", "lost prompts"])
def test_error_rates_hold_at_the_limit_itself(kind: str) -> None:
    """Exactly what is allowed: over all looks, no more than ALPHA are called a regression, and as few pass."""
    draw, sizes, gates = np.random.default_rng(1), looks(250), 1500
    wrong = {State.REGRESSION: 0, State.PASS: 0}
    for _ in range(gates):
        losses = draw.normal(0.1, 0.3, 250) if kind == "normal" else (draw.random(250) < 0.1).astype(float)
        for size, level in zip(sizes, levels(sizes), strict=True):
            state = judge(criterion(losses[:size], limit=0.1), level).state
            if state is not State.INCONCLUSIVE:
                wrong[state] += 1
                break
    # Three standard errors of a rate of 5 % in 1500 gates are 1.7 %.
    assert all(count / gates <= ALPHA + 0.017 for count in wrong.values())
    assert wrong[State.REGRESSION] / gates > 0.01
