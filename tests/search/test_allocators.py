from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_fakes import SHARES, FakeProfile, facts_of, layer_kl

from kvplan.calibrate.facts import LayerFacts
from kvplan.errors import MethodError
from kvplan.policy.schema import Target
from kvplan.search.allocators import allocators, knapsack
from kvplan.search.allocators.baklava import BaKlaVa
from kvplan.search.allocators.common_level import shares_at_common_level
from kvplan.search.allocators.prefixkv import PrefixKV
from kvplan.search.allocators.pyramid import Pyramid
from kvplan.search.allocators.squeeze import Squeeze
from kvplan.search.allocators.zigzag import ZigZag
from kvplan.search.budget import Budget
from kvplan.search.method import named
from kvplan.search.project import project

COSINES = [0.50, 0.72, 0.74, 0.76, 0.95, 0.96, 0.97, 0.80]


def layers(*importance: float) -> list[LayerFacts]:
    return [facts_of(x) for x in importance]


@pytest.mark.parametrize("name", list(allocators))
@given(importance=st.lists(st.floats(0, 2), min_size=1, max_size=40), mean=st.floats(0.05, 1))
def test_split_keeps_the_mean_and_is_never_negative(name: str, importance: list[float], mean: float) -> None:
    split = allocators[name]().split(layers(*importance), mean)
    assert len(split) == len(importance)
    assert min(split) >= 0
    assert sum(split) == pytest.approx(mean * len(importance))


@pytest.mark.parametrize("name", list(allocators))
@given(importance=st.lists(st.floats(0, 2), min_size=1, max_size=40), mean=st.integers(1000, 9999))
def test_projected_split_spends_the_total_and_keeps_floors(name: str, importance: list[float], mean: int) -> None:
    L = len(importance)
    split = allocators[name]().split(layers(*importance), mean / 10_000)
    units = project(split, [1] * L, mean * L, [640] * L, [10_000] * L)
    assert sum(units) == mean * L
    assert min(units) >= 640


def test_squeeze_gives_the_authors_windows() -> None:
    split = Squeeze(squeezed_part=0.08 / 0.21).split(layers(*[1 - s for s in COSINES]), 0.21)
    assert split == pytest.approx([0.288] * 4 + [0.08] * 3 + [0.288])


def test_squeeze_of_equal_layers_is_uniform() -> None:
    assert Squeeze().split(layers(*[0.3] * 4), 0.5) == [0.5] * 4


def test_pyramid_is_the_authors_arithmetic_sequence_with_an_exact_sum() -> None:
    assert [480 * x for x in Pyramid().split(layers(0, 0, 0, 0), 120 / 480)] == pytest.approx([234, 158, 82, 6])


def test_pyramid_never_gives_a_layer_more_than_everything() -> None:
    assert Pyramid().split(layers(0, 0, 0, 0), 0.7) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_pyramid_of_one_layer_is_the_mean() -> None:
    assert Pyramid().split(layers(1.0), 0.4) == [0.4]


def spread(*tokens: float) -> list[LayerFacts]:
    """Layers of which so many of 100 tokens hold 90 % of the attention."""
    return [LayerFacts(importance=0, mass_curve=((0.5, 0.01), (0.9, n / 100), (0.99, 1.0))) for n in tokens]


def test_zigzag_gives_the_published_budgets() -> None:
    split = ZigZag(bound=0.2).split(spread(40, 38.25, 35.25, 30), 16 / 100)
    assert [100 * x for x in split] == pytest.approx([17.4718, 16.8474, 15.7770, 13.9038], abs=1e-4)


def test_zigzag_with_a_bound_of_everything_is_uniform() -> None:
    assert ZigZag(bound=1).split(spread(40, 5), 0.3) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(("removed", "published"), [(48, [3, 10, 16, 18]), (96, [9, 22, 29, 34])])
def test_prefixkv_forgets_what_the_authors_code_forgets(removed: int, published: list[int]) -> None:
    T, L, protected = 48, 4, 2
    n = np.arange(T)
    facts = []
    for layer in range(L):
        x = ((7 * n**3 + 31 * n**2 + 17 * n + 101 * (20 + layer)) % 1009) / 1009
        sums = np.cumsum(np.sort(x ** (1 + 2 * layer) + 1e-3)[::-1])
        curve = tuple((float(mass), (i + 1) / T) for i, mass in enumerate(sums / sums[-1]))
        facts.append(LayerFacts(importance=0, prefix_curve=curve))
    mean = 1 - (removed + L * protected) / (L * T)  # their protected tokens come on top of those that hold the mass
    split = PrefixKV().split(facts, mean)
    forgotten = [T - protected - T * share for share in split]
    assert sum(forgotten) == pytest.approx(removed)
    # Theirs are whole tokens, up to four fewer in all.
    assert forgotten == pytest.approx(published, abs=1.5)


def test_equal_layers_reach_a_level_with_equal_shares() -> None:
    assert shares_at_common_level([((0.5, 0.1), (0.9, 0.4))] * 3, 0.25) == pytest.approx([0.25] * 3)


def test_a_layer_with_sharp_attention_needs_less_for_the_same_level() -> None:
    sharp, even = ((0.5, 0.01), (0.9, 0.05)), ((0.5, 0.5), (0.9, 0.9))
    low, high = shares_at_common_level([sharp, even], 0.3)
    assert low < 0.05 and high == pytest.approx(0.6 - low)


def test_baklava_has_two_levels_and_moves_with_its_layers() -> None:
    split = BaKlaVa(low_part=0.5).split(layers(0.9, 0.1, 0.8, 0.15), 0.4)
    assert split == pytest.approx([0.6, 0.2, 0.6, 0.2])
    assert BaKlaVa().split(layers(0.15, 0.8, 0.1, 0.9), 0.4) == pytest.approx(split[::-1])


def test_what_an_allocator_reads_must_be_there() -> None:
    early = [LayerFacts(importance=0.3, mass_curve=((0.9, 0.2),))] * 2
    assert [n for n in allocators if allocators[n].usable(early)] == ["pyramid", "squeeze", "uniform", "zigzag"]


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(MethodError, match=r"pyramid.beta is 0; it must be at least 1"):
        Pyramid(beta=0)
    with pytest.raises(MethodError, match=r"squeeze.squeezed_part is 1.5; it must be above 0 and at most 1"):
        Squeeze(squeezed_part=1.5)
    with pytest.raises(MethodError, match=r"zigzag.bound is 1.2; it must be between 0 and 1"):
        ZigZag(bound=1.2)
    with pytest.raises(MethodError, match=r"baklava.low_part is 0; it must be above 0 and at most 1"):
        BaKlaVa(low_part=0)


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
