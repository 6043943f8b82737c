from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_fakes import SHARES, FakeProfile, layer_kl

from kvplan.errors import MethodError
from kvplan.policy.schema import Target
from kvplan.search.allocators import allocators, knapsack
from kvplan.search.allocators.pyramid import Pyramid
from kvplan.search.allocators.squeeze import Squeeze
from kvplan.search.budget import Budget
from kvplan.search.method import named
from kvplan.search.project import project

COSINES = [0.50, 0.72, 0.74, 0.76, 0.95, 0.96, 0.97, 0.80]


@pytest.mark.parametrize("name", list(allocators))
@given(importance=st.lists(st.floats(0, 2), min_size=1, max_size=40), mean=st.floats(0.05, 1))
def test_split_keeps_the_mean_and_is_never_negative(name: str, importance: list[float], mean: float) -> None:
    split = allocators[name]().split(importance, mean)
    assert len(split) == len(importance)
    assert min(split) >= 0
    assert sum(split) == pytest.approx(mean * len(importance))


@pytest.mark.parametrize("name", list(allocators))
@given(importance=st.lists(st.floats(0, 2), min_size=1, max_size=40), mean=st.integers(1000, 9999))
def test_projected_split_spends_the_total_and_keeps_floors(name: str, importance: list[float], mean: int) -> None:
    L = len(importance)
    split = allocators[name]().split(importance, mean / 10_000)
    units = project(split, [1] * L, mean * L, [640] * L, [10_000] * L)
    assert sum(units) == mean * L
    assert min(units) >= 640


def test_squeeze_gives_the_authors_windows() -> None:
    split = Squeeze(squeezed_part=0.08 / 0.21).split([1 - s for s in COSINES], 0.21)
    assert split == pytest.approx([0.288] * 4 + [0.08] * 3 + [0.288])


def test_squeeze_of_equal_layers_is_uniform() -> None:
    assert Squeeze().split([0.3] * 4, 0.5) == [0.5] * 4


def test_pyramid_is_the_authors_arithmetic_sequence_with_an_exact_sum() -> None:
    assert [480 * x for x in Pyramid().split([0] * 4, 120 / 480)] == pytest.approx([234, 158, 82, 6])


def test_pyramid_never_gives_a_layer_more_than_everything() -> None:
    assert Pyramid().split([0] * 4, 0.7) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_pyramid_of_one_layer_is_the_mean() -> None:
    assert Pyramid().split([1.0], 0.4) == [0.4]


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(MethodError, match=r"pyramid.beta is 0; it must be at least 1"):
        Pyramid(beta=0)
    with pytest.raises(MethodError, match=r"squeeze.squeezed_part is 1.5; it must be above 0 and at most 1"):
        Squeeze(squeezed_part=1.5)


def test_curve_passes_through_its_measurements_and_falls() -> None:
    curve = {s: layer_kl(0, "snapkv", s / 10_000) for s in SHARES}
    values = [knapsack.kl_at(curve, share) for share in range(100, 10_001, 50)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0
    for share, kl in curve.items():
        assert knapsack.kl_at(curve, share) == pytest.approx(kl)


def test_noise_in_a_curve_does_not_make_less_better() -> None:
    curve = {2000: 0.1, 4000: 0.3, 7000: 0.05}
    assert knapsack.kl_at(curve, 2000) == pytest.approx(0.3)


def test_a_codec_costs_something_even_when_everything_is_kept() -> None:
    curve = {2000: 0.5, 5000: 0.3, 10_000: 0.1}
    assert knapsack.kl_at(curve, 10_000) == pytest.approx(0.1)
    assert knapsack.kl_at(curve, 7500) == pytest.approx(0.2)


def test_below_the_measured_shares_damage_at_least_doubles_per_halving() -> None:
    assert knapsack.kl_at({4000: 0.2, 7000: 0.19}, 2000) >= 0.4


@pytest.mark.parametrize("share", [1500, 4000, 8000])
def test_knapsack_beats_uniform_and_fits(share: int) -> None:
    profile = FakeProfile()
    chosen = {name: named(name) for name in profile.evictors}
    budget = Budget(spec=profile.spec, target=Target(share=share), context_tokens=1000)
    choice = knapsack.solve(profile.sensitivity, chosen, budget, budget.layers)
    assert sum(c.units * budget.cost(i, chosen[c.method]) for i, c in choice.items()) <= budget.total
    uniform = min(sum(layer_kl(i, e, share / 10_000) for i in range(8)) for e in profile.evictors)
    assert sum(layer_kl(i, c.method, min(c.units / 10_000, 1)) for i, c in choice.items()) < uniform
    assert all(c.units >= budget.floor(i, chosen[c.method]) for i, c in choice.items())


def test_knapsack_at_the_smallest_target_keeps_every_floor() -> None:
    profile = FakeProfile()
    chosen = {"streaming": named("streaming")}
    budget = Budget(spec=profile.spec, target=Target(share=640), context_tokens=1000)
    choice = knapsack.solve(profile.sensitivity, chosen, budget, budget.layers)
    assert {c.units for c in choice.values()} == {640}
