"""StepCosts: how long a decode step takes under any policy, from a few uniform ones that were timed.

A step is taken for a floor, which no cache changes, and a part for each layer that is linear in its slots. What a layer
does adds up: its evictor (or `full`), and on top of it its codecs, head split, channels and merger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvplan.methods.params import settings
from kvplan.model_spec import ModelSpec
from kvplan.policy.memory import capacity
from kvplan.policy.schema import LayerPolicy, Policy

FULL, SHARES, BASE = "full", "shares", "evictor streaming"


@dataclass(frozen=True)
class Line:
    """Seconds: without any slot, and more for each slot."""

    start: float = 0.0
    per_slot: float = 0.0

    def __add__(self, other: Line) -> Line:
        return Line(self.start + other.start, self.per_slot + other.per_slot)

    def __mul__(self, factor: float) -> Line:
        return Line(self.start * factor, self.per_slot * factor)

    def at(self, slots: float) -> float:
        return self.start + self.per_slot * slots

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]], least: float = 0.0) -> Line:
        """The least squares of (slots, seconds) that rise by at least so much a slot."""
        slots, seconds = np.array(points, dtype=float).T
        apart = slots - slots.mean()
        slope = max(least, float(apart @ seconds) / float(apart @ apart)) if apart.any() else 0.0
        return cls(float(seconds.mean()) - slope * float(slots.mean()), slope)


@dataclass(frozen=True)
class Timed:
    """Steps under policies that are alike but for their slots.

    Args:
        part: What they are timed for.
        num_layers: How many layers have it.
        known: Other parts, timed before, and in how many layers each is.
        points: (slots of a layer, seconds of a step).
        per_slot_of: A part whose seconds a slot are taken over; for policies that have one number of slots only.
    """

    part: str
    num_layers: int
    known: Mapping[str, int]
    points: Sequence[tuple[float, float]]
    per_slot_of: str | None = None


@dataclass(frozen=True)
class StepCosts:
    """The table.

    Attributes:
        context_tokens: Prompt before the steps that were timed.
        reference: Seconds of a step on transformers' full cache.
        floor: Seconds of a step whose layers hold nothing.
        parts: What each thing that a layer does adds, for one layer.
    """

    context_tokens: int
    reference: float
    floor: float
    parts: Mapping[str, Line]

    @classmethod
    def fit(cls, context_tokens: int, reference: float, timed: Sequence[Timed]) -> StepCosts:
        """From steps in which what is new follows what it builds on; the first is `BASE`, in every searched layer."""
        assert timed[0].part == BASE
        floor, parts = Line.through(timed[0].points).start, dict[str, Line]()
        for one in timed:
            known = sum((parts[part] * count for part, count in one.known.items()), Line(floor))
            rest = [(slots, seconds - known.at(slots)) for slots, seconds in one.points]
            # A codec may save time a slot, but only noise can say that more slots cost less.
            added = Line.through(rest, -known.per_slot)
            if one.per_slot_of is not None:
                slots, seconds = np.mean(rest, 0)
                slope = parts[one.per_slot_of].per_slot * one.num_layers
                added = Line(float(seconds) - slope * float(slots), slope)
            parts[one.part] = added * (1 / one.num_layers)
        return cls(context_tokens, reference, floor, parts)

    def step_seconds(self, policy: Policy, spec: ModelSpec) -> float:
        """Predicted seconds of a decode step of one row after a prompt of `context_tokens`."""
        return self.floor + sum(self.layer_seconds(policy, spec, i) for i in range(spec.num_layers))

    def layer_seconds(self, policy: Policy, spec: ModelSpec, index: int) -> float:
        """What one layer adds: never less with more slots."""
        layer, shape = policy.layers[index], spec.layers[index]
        # A window of the model's own is in every policy, and so in the floor.
        names = [name for name in parts_of(layer) if shape.window is None or name != FULL]
        total = sum((self.parts[name] for name in names), Line())
        slots = held_slots(policy, spec, policy.source(index), self.context_tokens)
        return max(0.0, Line(total.start, max(0.0, total.per_slot)).at(slots))

    def speedup(self, policy: Policy, spec: ModelSpec) -> float:
        """Predicted decode speed over transformers' full cache."""
        return self.reference / self.step_seconds(policy, spec)

    def as_data(self) -> dict[str, Any]:
        """For a file, in milliseconds."""
        return {
            "context_tokens": self.context_tokens,
            "full_cache_ms": self.reference * 1e3,
            "floor_ms": self.floor * 1e3,
            "layer_ms": {
                name: {"start": line.start * 1e3, "per_1000_slots": line.per_slot * 1e6}
                for name, line in self.parts.items()
            },
        }


def parts_of(layer: LayerPolicy) -> dict[str, LayerPolicy]:
    """What a layer does, by name, each with a layer that does just that (and has the evictor that it needs)."""
    if layer.shares is not None:
        return {SHARES: LayerPolicy(shares=layer.shares)}
    evictor = LayerPolicy(slots=layer.slots, evictor=layer.evictor)
    # Settings of evictors, splits and mergers change who stays, and hardly how long a step takes.
    found = {FULL: LayerPolicy()} if layer.slots.is_full else {f"evictor {layer.evictor.name}": evictor}
    keys, values = layer.key_codec, layer.value_codec
    if (keys.name, values.name) != ("dense", "dense"):
        # Together: encoded keys or values, either takes attention to the slower kernel.
        stored = LayerPolicy(key_codec=keys, value_codec=values)
        found[f"codecs {_told(keys)}/{_told(values)}"] = stored
    if layer.channels is not None:
        found[f"channels {_told(layer.channels)}"] = LayerPolicy(channels=layer.channels)
    if layer.head_split is not None:
        found[f"heads {layer.head_split.name}"] = replace(evictor, head_split=layer.head_split)
    if layer.merger is not None:
        found[f"merger {layer.merger.name}"] = replace(evictor, merger=layer.merger)
    return found


def held_slots(policy: Policy, spec: ModelSpec, index: int, context_tokens: int) -> float:
    """Slots per KV head of a layer after a prompt."""
    layer, shape = policy.layers[index], spec.layers[index]
    limits = [capacity(layer, shape, context_tokens, head) for head in range(shape.kv_heads)]
    return sum(context_tokens if most is None else min(most, context_tokens) for most in limits) / len(limits)


def _told(method: Any) -> str:
    told = ", ".join(f"{name}={value}" for name, value in settings(method).items())
    return f"{method.name}({told})" if told else str(method.name)
