"""step_costs(): time the few uniform policies from which every other policy's decode step is predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvplan.check.cost import REFERENCE, decode_times
from kvplan.check.step_costs import BASE, FULL, SHARES, StepCosts, Timed, held_slots, parts_of
from kvplan.methods.evictors.streaming import Streaming
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Slots


@dataclass(frozen=True)
class Probe:
    """Policies that are alike but for their slots; what they are of, as in `Timed`."""

    part: str
    num_layers: int
    known: Mapping[str, int]
    policies: Sequence[Policy]
    per_slot_of: str | None = None


def step_costs(
    model: Any,
    spec: ModelSpec,
    probes: Sequence[Probe],
    prompt_ids: Sequence[int],
    *,
    new_tokens: int,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> StepCosts:
    """Time every probe, beside transformers' full cache, after a prompt of one row.

    Args:
        probes: From `probes_for`, at this prompt's length.
        new_tokens: Decoded in each round.
        repeats: Rounds, after one that warms up; the median counts.
        progress: Called `(policies of the probes + 1) * (repeats + 1)` times.
    """
    policies = {f"{probe.part}/{i}": policy for probe in probes for i, policy in enumerate(probe.policies)}
    times = decode_times(model, spec, policies, prompt_ids, new_tokens, repeats, progress)
    step = {name: statistics.median(spent) / new_tokens for name, spent in times.items()}
    first = next(i for i, shape in enumerate(spec.layers) if shape.window is None)
    timed = [
        Timed(
            probe.part,
            probe.num_layers,
            probe.known,
            [
                (held_slots(policy, spec, first, len(prompt_ids)), step[f"{probe.part}/{number}"])
                for number, policy in enumerate(probe.policies)
            ],
            probe.per_slot_of,
        )
        for probe in probes
    ]
    return StepCosts.fit(len(prompt_ids), step[REFERENCE], timed)


def probes_for(policies: Iterable[Policy], spec: ModelSpec, context_tokens: int) -> list[Probe]:
    """What must be timed to predict these policies: each thing that one of their layers does, at few and at many slots.

    Args:
        spec: With at least one layer that has no window of its own; only such layers are cut.
        context_tokens: Prompt tokens before the steps.
    """
    policies = list(policies)
    needed = {name: layer for policy in policies for each in policy.layers for name, layer in parts_of(each).items()}
    needed.pop(SHARES, None)
    free = [i for i, shape in enumerate(spec.layers) if shape.window is None]
    base = LayerPolicy(evictor=Streaming())
    order = {BASE: base, FULL: LayerPolicy()} | dict(sorted(needed.items(), key=lambda item: _depth(item[0])))
    probes = [_probe(part, layer, free, spec, context_tokens) for part, layer in order.items()]
    readers = [{i: e.shares for i, e in enumerate(policy.layers) if e.shares is not None} for policy in policies]
    if any(readers):
        probes.append(_sharing(max(readers, key=len), free, spec, context_tokens))
    return probes


def _depth(part: str) -> int:
    """What builds on other parts comes after them."""
    return 0 if part.startswith("evictor ") else 1


def _probe(part: str, layer: LayerPolicy, free: Sequence[int], spec: ModelSpec, context_tokens: int) -> Probe:
    """One thing in every layer that may be cut (`free`)."""
    if part == FULL:
        return Probe(part, len(free), {}, [_policy({}, spec)], per_slot_of=BASE)
    unit, recent = layer.stored_whole
    policies = [
        _policy(dict.fromkeys(free, replace(layer, slots=slots)), spec)
        for slots in _few_and_many(context_tokens, 64 + unit + recent)
    ]
    known = {} if part.startswith("evictor ") else {f"evictor {layer.evictor.name}": len(free)}
    return Probe(part, len(free), known, policies)


def _sharing(readers: Mapping[int, int], free: Sequence[int], spec: ModelSpec, context_tokens: int) -> Probe:
    """A few layers that share: too few to tell what a slot costs them, which is what it costs the others."""
    policies = []
    for slots in _few_and_many(context_tokens, 64):
        cut = LayerPolicy(slots=slots, evictor=Streaming())
        policies.append(_policy({i: LayerPolicy(shares=readers[i]) if i in readers else cut for i in free}, spec))
    return Probe(SHARES, len(readers), {BASE: len(free) - len(readers)}, policies, per_slot_of=BASE)


def _few_and_many(context_tokens: int, least: int) -> tuple[Slots, Slots]:
    few = max(context_tokens // 8, least)
    return Slots(tokens=few), Slots(tokens=max(2 * few, context_tokens * 5 // 8))


def _policy(layers: Mapping[int, LayerPolicy], spec: ModelSpec) -> Policy:
    """All other layers are full."""
    return Policy(layers=tuple(layers.get(i, LayerPolicy()) for i in range(spec.num_layers)), model=spec.policy_block())
