"""Predicted decode times: the arithmetic, with tables and clocks that are made up. Nothing here is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import DynamicCache

from kvplan.check import cost
from kvplan.check.step_costs import BASE, FULL, Line, StepCosts, Timed, held_slots, parts_of
from kvplan.check.step_probes import probes_for, step_costs
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.turboquant import TurboQuant
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.attach import spec_of

CONTEXT = 400
SPEC = ModelSpec((LayerSpec(2, 8, 8),) * 3 + (LayerSpec(2, 8, 8, window=32),), query_heads=4, dtype="float32")
MADE_UP = StepCosts(
    CONTEXT,
    reference=10.0,
    floor=2.0,
    parts={
        BASE: Line(0.0, 0.01),
        FULL: Line(0.5, 0.01),
        "evictor h2o": Line(1.0, 0.02),
        "codecs int8/int8": Line(0.25, -0.005),
        "shares": Line(-0.25, 0.01),
    },
)


def cut(tokens: int, name: str = "streaming", **more: Any) -> LayerPolicy:
    return LayerPolicy(slots=Slots(tokens=tokens), evictor=evictors[name](), **more)


def of(*layers: LayerPolicy) -> Policy:
    return Policy(layers=(*layers, *(LayerPolicy(),) * (4 - len(layers))))


def test_a_step_is_the_floor_and_what_each_layer_adds() -> None:
    int8 = {"key_codec": Int8(), "value_codec": Int8()}
    policy = of(cut(100, "h2o", **int8), LayerPolicy(shares=0), LayerPolicy(**int8))
    # h2o 1 + 0.02 and int8 0.25 - 0.005 at 100; shared at the source's 100; full and int8 at the 400 of the prompt.
    assert MADE_UP.step_seconds(policy, SPEC) == pytest.approx(2 + (1.25 + 1.5) + (-0.25 + 1) + (0.75 + 2))
    assert MADE_UP.speedup(policy, SPEC) == pytest.approx(10 / 8.25)


def test_more_slots_never_take_less_and_the_windows_of_a_model_are_in_its_floor() -> None:
    cheaper = replace(MADE_UP, parts=MADE_UP.parts | {"codecs int8/int8": Line(0.25, -1.0)})
    int8 = {"key_codec": Int8(), "value_codec": Int8()}
    times = [cheaper.step_seconds(of(cut(n, **int8)), SPEC) for n in (20, 100, 399)]
    assert times == sorted(times)
    assert MADE_UP.step_seconds(of(cut(50)), SPEC) < MADE_UP.step_seconds(of(cut(51)), SPEC)
    assert MADE_UP.layer_seconds(of(), SPEC, 3) == 0


def test_lines_are_fitted_in_turn() -> None:
    # 3 layers: a step takes 6 + 3 * 0.1 a slot, h2o 3 * (1 + 0.2 a slot) instead, full 3 * 2 more, int8 3 * (1 - 0.05).
    timed = [
        Timed(BASE, 3, {}, [(10, 9.0), (20, 12.0)]),
        Timed(FULL, 3, {}, [(40, 6 + 12 + 6.0)], per_slot_of=BASE),
        Timed("evictor h2o", 3, {}, [(10, 6 + 3 + 6.0), (20, 6 + 3 + 12.0)]),
        Timed("codecs int8/int8", 3, {"evictor h2o": 3}, [(10, 15 + 3 - 1.5), (20, 21 + 3 - 3.0)]),
        Timed("shares", 1, {BASE: 2}, [(10, 6 + 2 + 1.5), (20, 6 + 4 + 2.5)], per_slot_of=BASE),
    ]
    found = StepCosts.fit(40, 18.0, timed)
    assert found.floor == pytest.approx(6.0)
    expected = {
        BASE: (0, 0.1),
        FULL: (2, 0.1),
        "evictor h2o": (1, 0.2),
        "codecs int8/int8": (1, -0.05),
        "shares": (0.5, 0.1),
    }
    assert {name: (line.start, line.per_slot) for name, line in found.parts.items()} == {
        name: pytest.approx(line) for name, line in expected.items()
    }
    assert found.as_data()["layer_ms"]["evictor h2o"] == pytest.approx({"start": 1e3, "per_1000_slots": 2e5})


def test_a_line_does_not_fall_where_only_noise_can_make_it() -> None:
    assert Line.through([(10, 2.0), (20, 1.0)]) == Line(1.5, 0.0)
    assert Line.through([(64, 2.0), (64, 4.0)]) == Line(3.0, 0.0)


def test_everything_that_a_layer_does_is_timed_once() -> None:
    split = replace(cut(64, "snapkv"), head_split=head_splits["adakv"]())
    codecs = {"key_codec": Int8(), "value_codec": TurboQuant(bits=2)}
    policies = [of(split, LayerPolicy(**codecs)), of(cut(90, "h2o", **codecs), LayerPolicy(shares=0))]
    probes = probes_for(policies, SPEC, CONTEXT)
    assert [(p.part, len(p.policies), dict(p.known)) for p in probes] == [
        (BASE, 2, {}),
        (FULL, 1, {}),
        ("evictor snapkv", 2, {}),
        ("evictor h2o", 2, {}),
        ("heads adakv", 2, {"evictor snapkv": 3}),
        ("codecs int8/turboquant(bits=2)", 2, {BASE: 3}),
        ("shares", 2, {BASE: 2}),
    ]
    for probe in probes:
        assert all(policy.layers[3] == LayerPolicy() for policy in probe.policies)  # the model's own window
        for policy in probe.policies:
            assert probe.num_layers == sum(probe.part in parts_of(policy.layers[i]) for i in range(3))


def test_what_a_made_up_clock_measures_is_predicted(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(tiny_llama)
    adds = {BASE: Line(1.0, 0.01), FULL: Line(1.5, 0.01), "evictor h2o": Line(2.0, 0.03)}
    adds |= {"codecs int8/int8": Line(0.5, 0.02), "shares": Line(0.1, 0.01)}

    def clock(model: Any, cache: Any, ids: Any, new_tokens: int) -> float:
        if isinstance(cache, DynamicCache):
            return 20.0 * new_tokens
        return new_tokens * seconds(cache.policy)

    def seconds(policy: Policy) -> float:
        slots = [held_slots(policy, spec, policy.source(i), CONTEXT) for i in range(4)]
        lines = [sum((adds[name] for name in parts_of(layer)), Line()) for layer in policy.layers]
        return 5.0 + sum(line.at(n) for line, n in zip(lines, slots, strict=True))

    monkeypatch.setattr(cost, "decode_seconds", clock)
    int8 = {"key_codec": Int8(), "value_codec": Int8()}
    policies = [
        of(cut(70, "h2o", **int8), cut(40), LayerPolicy(), LayerPolicy(**int8)),
        of(cut(100, **int8), LayerPolicy(shares=0), cut(399), cut(128, "h2o")),
    ]
    ticks: list[None] = []
    probes = probes_for(policies, spec, CONTEXT)
    found = step_costs(
        tiny_llama, spec, probes, [3] * CONTEXT, new_tokens=2, repeats=1, progress=lambda: ticks.append(None)
    )
    assert len(ticks) == 2 * (1 + sum(len(probe.policies) for probe in probes))
    for policy in policies:
        assert found.step_seconds(policy, spec) == pytest.approx(seconds(policy))
        assert found.speedup(policy, spec) == pytest.approx(20 / seconds(policy))
