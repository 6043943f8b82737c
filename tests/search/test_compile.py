from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_fakes import FakeProfile, spec_of, total_kl

from kvplan.errors import ProfileError, TargetError
from kvplan.policy.memory import plan
from kvplan.policy.rules import check_model, check_policy
from kvplan.policy.schema import Policy, Target
from kvplan.search.allocators import allocators
from kvplan.search.budget import Budget, Protection
from kvplan.search.compile import Compiler, Params
from kvplan.search.decisions import KINDS, Decisions
from kvplan.search.method import named
from kvplan.search.space import SearchSpace

PLAIN = FakeProfile()
ENCODED = FakeProfile(codecs=("int8/dense", "dense/int8", "turboquant4/dense", "dense/turboquant4"))
WINDOWED = FakeProfile(spec=spec_of(windows=(1, 4)))


def budget_of(profile: FakeProfile, target: Target, context: int = 1000) -> Budget:
    return Budget(spec=profile.spec, target=target, context_tokens=target.context_tokens or context)


def compiler_of(profile: FakeProfile, target: Target, names: Sequence[str] = (), **options: Any) -> Compiler:
    return Compiler(profile, budget_of(profile, target), names, **options)  # type: ignore[arg-type]


COMPILERS = {
    "40%": compiler_of(PLAIN, Target(share=4000)),
    "9%": compiler_of(PLAIN, Target(share=900)),
    "99%": compiler_of(PLAIN, Target(share=9900)),
    "windows": compiler_of(WINDOWED, Target(share=4000)),
    "codecs": compiler_of(ENCODED, Target(share=2500)),
    "below plain slots": compiler_of(ENCODED, Target(share=300)),
    "codecs in bytes": compiler_of(ENCODED, Target(bytes=2**20, context_tokens=600, batch=3)),
    "bytes": compiler_of(PLAIN, Target(bytes=2**20, context_tokens=600, batch=3)),
}


@st.composite
def sampled(draw: st.DrawFn, compiler: Compiler) -> Params:
    space = SearchSpace(compiler, Decisions(KINDS))
    G = len(compiler.groups)
    return Params(
        split=draw(st.sampled_from(space.splits)),
        scales=tuple(draw(st.lists(st.floats(0.25, 4), min_size=G, max_size=G))),
        evictors=tuple(draw(st.lists(st.sampled_from(space.evictors), min_size=G, max_size=G))),
        shared_layers=draw(st.integers(0, compiler.max_shared)),
        split_heads=draw(st.booleans()),
        dropped_channels=draw(st.sampled_from([0.0, *space.channels])),
        tuned=draw(st.sampled_from([(), (("snapkv", "window_tokens", 8), ("snapkv", "pooling", "max"))])),
    )


def held(policy: Policy, compiler: Compiler, tokens: int) -> float:
    target = compiler.budget.target
    planned = plan(policy, compiler.budget.spec, [tokens] * target.batch)
    return planned.total / (target.bytes or planned.full * (target.share or 0) / 10_000)


@pytest.mark.parametrize("name", COMPILERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_point_compiles_to_a_valid_policy_under_the_target(name: str, data: st.DataObject) -> None:
    compiler = COMPILERS[name]
    policy = compiler.compile(data.draw(sampled(compiler)))
    check_policy(policy)
    check_model(policy, compiler.budget.spec)
    share = held(policy, compiler, compiler.budget.context_tokens)
    everything = all(layer.slots.is_full for layer in policy.layers if layer.shares is None)
    assert share <= 1 and (share >= 0.97 or everything)


@pytest.mark.parametrize("tokens", [1000, 1001, 1777, 31_999])
def test_a_percentage_holds_at_every_longer_prompt(tokens: int) -> None:
    compiler = COMPILERS["40%"]
    for start in SearchSpace(compiler).warm_starts():
        assert held(compiler.compile(start.params), compiler, tokens) <= 1


def test_full_layers_pay_for_no_side_arrays() -> None:
    compiler = COMPILERS["99%"]
    G = len(compiler.groups)
    policy = compiler.compile(Params(split="pyramid", scales=(1.0,) * G, evictors=("h2o",) * G))
    assert any(layer.slots.is_full for layer in policy.layers)
    assert plan(policy, PLAIN.spec, [1000]).ratio <= 0.99


def test_the_profile_method_stores_layers_in_fewer_bytes_where_that_costs_least() -> None:
    compiler = COMPILERS["codecs"]
    joint = compiler.compile(SearchSpace(compiler).warm_starts()[0].params)
    plain = Compiler(ENCODED, compiler.budget, codecs=["dense"])  # type: ignore[arg-type]
    tokens = plain.compile(SearchSpace(plain).warm_starts()[0].params)
    assert {layer.key_codec.name for layer in joint.layers} > {"turboquant"}
    assert {layer.key_codec.name for layer in tokens.layers} == {"dense"}
    assert total_kl(joint) < total_kl(tokens) / 2


def test_codecs_of_keys_and_values_are_paired_and_those_that_are_never_best_left_out() -> None:
    compiler = COMPILERS["codecs"]
    assert len(compiler.methods) == 3 * 9
    offered = [str(precision) for precision in compiler.precisions]
    assert offered == ["dense/int8", "int8", "int8/turboquant4", "turboquant4"]
    space = SearchSpace(compiler)
    assert space.evictors == ["h2o", "snapkv", "streaming", *(f"h2o+{p}" for p in offered), "profile"]
    starts = {start.label for start in space.warm_starts()}
    assert {"uniform h2o+int8", "uniform h2o+turboquant4"} <= starts and "uniform h2o+int8/turboquant4" not in starts


@pytest.mark.parametrize(
    ("wanted", "offered"),
    [
        (["dense"], []),
        (["int8"], ["dense/int8", "int8"]),
        (["int8/turboquant4"], ["int8/turboquant4"]),
        (["turboquant4/dense", "dense"], ["turboquant4/dense"]),
    ],
)
def test_codecs_can_be_chosen(wanted: list[str], offered: list[str]) -> None:
    compiler = Compiler(ENCODED, COMPILERS["codecs"].budget, codecs=wanted)  # type: ignore[arg-type]
    assert [str(precision) for precision in compiler.precisions] == offered


@pytest.mark.parametrize(
    ("codec", "told"),
    [
        ("turboquant2", "no sensitivity for the codec turboquant2; .* dense, int8, turboquant4"),
        ("fp9", "--codec: unknown codec 'fp9'; choose among: dense, int8"),
    ],
)
def test_a_codec_that_was_not_measured_is_refused(codec: str, told: str) -> None:
    with pytest.raises(ProfileError, match=told):
        Compiler(ENCODED, COMPILERS["codecs"].budget, codecs=[codec])  # type: ignore[arg-type]


def test_sharing_leaves_its_bytes_to_the_others() -> None:
    compiler = COMPILERS["40%"]
    G = len(compiler.groups)
    plain, shared = (
        compiler.compile(Params(split="uniform", scales=(1.0,) * G, evictors=("streaming",) * G, shared_layers=n))
        for n in (0, 2)
    )
    assert {layer.slots.share for layer in plain.layers} == {4000}
    assert sum(layer.shares is not None for layer in shared.layers) == 2
    assert {layer.slots.share for layer in shared.layers if layer.shares is None} == {5333, 5334}


def test_native_windows_stay_full() -> None:
    policy = COMPILERS["windows"].compile(SearchSpace(COMPILERS["windows"]).warm_starts()[0].params)
    assert policy.layers[1].slots.is_full and policy.layers[4].slots.is_full


def test_groups_are_found_and_hold_every_layer_once() -> None:
    groups = COMPILERS["40%"].groups
    assert len(groups) >= 2
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert 0 in groups[-1] and 4 in groups[0]


def test_warm_starts_are_distinct_points_within_the_ranges() -> None:
    compiler = COMPILERS["40%"]
    space = SearchSpace(compiler)
    starts = space.warm_starts()
    assert len({start.label for start in starts}) == len({start.params for start in starts}) == len(starts)
    recipes = {f"{split} h2o" for split in allocators} | {"uniform snapkv", "uniform streaming"}
    assert recipes == {start.label for start in starts if start.is_recipe}
    assert "knapsack" in {start.label for start in starts}
    for start in starts:
        assert all(0.25 <= x <= 4 for x in start.params.scales)
        assert space.params(space.flat(start.params)) == start.params


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (
            Target(share=500),
            "target 5% is below the smallest policy: 6.4% or 64.00 KiB (64 slots in each of 8 layers with snapkv, at "
            "1000 prompt tokens); raise --mem or lower --min-slots",
        ),
        (
            Target(bytes=50_000, context_tokens=1000, batch=2),
            "target 48.83 KiB is below the smallest policy: 6.4% or 128.00 KiB (64 slots in each of 8 layers with "
            "snapkv, at 1000 prompt tokens and batch 2); raise --mem or lower --min-slots",
        ),
    ],
)
def test_an_infeasible_target_names_the_smallest_one(target: Target, told: str) -> None:
    with pytest.raises(TargetError) as caught:
        Compiler(PLAIN, budget_of(PLAIN, target))  # type: ignore[arg-type]
    assert str(caught.value) == told


def test_a_floor_as_dear_as_the_full_cache_is_told() -> None:
    with pytest.raises(TargetError) as caught:
        compiler_of(PLAIN, Target(bytes=10_000, context_tokens=64), ["h2o"])
    assert str(caught.value) == (
        "64 slots in each of 8 layers with h2o cost as much as the full cache of 64 prompt tokens; lower --min-slots, "
        "or plan for longer prompts"
    )


def test_codecs_reach_targets_that_plain_slots_do_not() -> None:
    compiler = COMPILERS["below plain slots"]
    assert not any(map(compiler.fits, compiler.names))
    starts = SearchSpace(compiler).warm_starts()
    assert {"knapsack", "uniform h2o+turboquant4"} < {start.label for start in starts}
    assert all(compiler.fits(name) for start in starts for name in start.params.evictors)
    G = len(compiler.groups)
    policy = compiler.compile(Params(split="uniform", scales=(1.0,) * G, evictors=("snapkv",) * G))
    stored = {(layer.evictor.name, layer.key_codec.name, layer.value_codec.name) for layer in policy.layers}
    assert stored == {("snapkv", "int8", "turboquant")}  # the dearest of its evictor that fits
    with pytest.raises(TargetError, match=r"is below the smallest policy: .* with .* and turboquant4"):
        compiler_of(ENCODED, Target(share=100))


def test_the_named_smallest_target_is_feasible_and_the_one_below_is_not() -> None:
    chosen = [named("h2o")]
    budget_of(PLAIN, Target(share=720)).check(chosen)
    with pytest.raises(TargetError):
        budget_of(PLAIN, Target(share=719)).check(chosen)


def test_unmeasured_evictors_are_refused() -> None:
    with pytest.raises(
        ProfileError, match="the profile holds no sensitivity for tova; calibrate with it, or choose among: h2o"
    ):
        compiler_of(PLAIN, Target(share=4000), ["h2o", "tova"])
    with pytest.raises(ProfileError, match="run kvplan calibrate without --no-sensitivity"):
        Compiler(FakeProfile(evictors=()), budget_of(PLAIN, Target(share=4000)))  # type: ignore[arg-type]


def test_protection_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        TargetError, match="--min-slots is 10; 4 sink \\+ 16 recent tokens do not fit; raise it to at least 20"
    ):
        Protection(min_slots=10)
