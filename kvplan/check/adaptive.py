"""check(): policies against their limits on as many prompts as it takes to tell, up to all of them. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from kvplan.check.criteria import Limits, criteria, exact, reproduced
from kvplan.check.gate import Finding, State, judge, levels, looks, worst
from kvplan.check.results import PromptRow
from kvplan.errors import MemoryPlanExceeded

WORST_PROMPTS = 5

# Names of policies and indices of prompts -> the rows of each policy, in that order.
Measure = Callable[[Sequence[str], Sequence[int]], Mapping[str, Sequence[PromptRow]]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A policy to check.

    Attributes:
        base: The baseline's rows of all prompts, or None: it is held to the full cache.
        same_plan: The baseline measured this very plan.
    """

    name: str
    limits: Limits
    base: Sequence[PromptRow] | None = None
    same_plan: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found about one policy.

    Attributes:
        state: The worst of the findings.
        prompts: Measured before it was clear.
        available: That could have been measured.
        looks: How many times it was judged.
        reproduced: Every prompt gave the baseline's numbers; no statistics were needed.
        harmed: The prompts that lost most, with their loss in nats; only those that lost.
        broken: Why it could not be measured on, where a cache held more than its plan.
    """

    policy: str
    state: State
    findings: tuple[Finding, ...]
    prompts: int
    available: int
    looks: int
    reproduced: bool = False
    harmed: tuple[tuple[str, float], ...] = ()
    broken: str = ""


def check(
    measure: Measure,
    asked: Sequence[Asked],
    order: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """Measure in growing steps and judge after each; a policy that is decided is measured no more.

    Args:
        order: The prompts, in the order in which they are measured; see `evenly`.
        progress: Called with prompts measured and their number.
    """
    sizes = looks(len(order))
    rows: dict[str, list[PromptRow]] = {one.name: [] for one in asked}
    found: dict[str, Outcome] = {}
    done = 0
    for number, (size, level) in enumerate(zip(sizes, levels(sizes), strict=True), start=1):
        left = [one for one in asked if one.name not in found or found[one.name].state is State.INCONCLUSIVE]
        if not left:
            break
        step = order[done:size]
        for name, measured in _measured(measure, [one.name for one in left], step).items():
            if isinstance(measured, str):
                found[name] = _over_plan(name, measured, size, len(order), number)
            else:
                rows[name] += measured
        for one in left:
            if not (one.name in found and found[one.name].broken):
                base = None if one.base is None else [one.base[i] for i in order[:size]]
                found[one.name] = look(one, rows[one.name], base, level, number=number, available=len(order))
        done = size
        progress(done, len(order))
    return [found[one.name] for one in asked]


def look(
    asked: Asked,
    rows: Sequence[PromptRow],
    base: Sequence[PromptRow] | None,
    level: float,
    *,
    number: int,
    available: int,
) -> Outcome:
    """Judge what has been measured so far, at an error rate."""
    same = base is not None and asked.same_plan and reproduced(rows, base, asked.limits, available)
    findings = exact(rows, base, asked.limits)
    for criterion in criteria(rows, base, asked.limits):
        finding = judge(criterion, level)
        # The same numbers need no statistics to be called the same.
        unchanged = same and criterion.relative
        findings.append(replace(finding, state=State.PASS, unchanged=True) if unchanged else finding)
    return Outcome(
        policy=asked.name,
        state=worst(finding.state for finding in findings),
        findings=tuple(findings),
        prompts=len(rows),
        available=available,
        looks=number,
        reproduced=same,
        harmed=_harmed(rows, base),
    )


def evenly(kinds: Sequence[Hashable], seed: int) -> list[int]:
    """The indices in an order in which every kind comes at its share of any first part; drawn by the seed."""
    draw, groups = Random(seed), dict[Hashable, list[int]]()
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    place: dict[int, float] = {}
    for members in groups.values():
        draw.shuffle(members)
        start = draw.random()
        place |= {index: (number + start) / len(members) for number, index in enumerate(members)}
    return sorted(place, key=lambda index: place[index])


def _measured(measure: Measure, names: Sequence[str], step: Sequence[int]) -> dict[str, Sequence[PromptRow] | str]:
    """The rows of each policy, or why there are none: its cache held more than it plans."""
    try:
        return dict(measure(names, step))
    except MemoryPlanExceeded as error:
        if len(names) == 1:
            return {names[0]: str(error)}
    found: dict[str, Sequence[PromptRow] | str] = {}
    for name in names:  # one of them is to blame
        found |= _measured(measure, [name], step)
    return found


def _over_plan(name: str, told: str, prompts: int, available: int, number: int) -> Outcome:
    return Outcome(
        policy=name,
        state=State.REGRESSION,
        findings=(),
        prompts=prompts,
        available=available,
        looks=number,
        broken=told,
    )


def _harmed(rows: Sequence[PromptRow], base: Sequence[PromptRow] | None) -> tuple[tuple[str, float], ...]:
    before = [0.0] * len(rows) if base is None else [row.kl for row in base]
    losses = [(row.id, row.kl - kl) for row, kl in zip(rows, before, strict=True)]
    harmed = [loss for loss in losses if loss[1] > 0]
    return tuple(sorted(harmed, key=lambda loss: -loss[1])[:WORST_PROMPTS])
